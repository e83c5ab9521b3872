"""What a config, a mesh and the length of a run define, and the programs compiled from it."""

from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import os
import threading
from typing import Any, Literal

from etils import epath
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from configs import image_sizes
from input_pipeline.errors import first_line
from trainer import compiler, distill, evaluate, finetune, models, replicas, schedules
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import optimizer as optimizer_lib
from trainer import step as step_lib
from trainer.errors import ConfigError
from trainer.models import packing
from trainer.sparse import method as sparse_lib
from trainer.state import Model, TrainState, make_init

Mode = Literal["train", "eval", "statistics", "replicas", "recompute"]

# The entries of a host batch that each kind of step reads.
BATCHES: dict[Mode, tuple[str, ...]] = {
  "train": ("image", "label"),
  "eval": evaluate.BATCH,
  "statistics": ("image",),
  "replicas": (),
  "recompute": ("image", "label"),
}


@dataclasses.dataclass(frozen=True)
class Program:
  """What a config, a mesh and the length of the run define; no array is made yet.

  Attributes:
    config: a validated config.
    mesh: the devices.
    lengths: durations in steps.
    model: the model without its arrays.
    schedule: steps taken -> learning rate.
    optimizer: the gradient transformation.
    mask: which parameters decay; None for all.
    init: returns the state of step 0; to be jitted.
    abstract_state: its shapes, dtypes and shardings.
    sparse: which weights are zero; None of a dense run.
    teacher: that the run learns from, if it does. Evaluations need none.
  """

  config: ml_collections.ConfigDict
  mesh: Mesh
  lengths: config_lib.Durations
  model: Model
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  mask: optimizer_lib.Mask
  init: Callable[[], TrainState]
  abstract_state: TrainState
  sparse: sparse_lib.Sparse | None = None
  teacher: distill.Teacher | None = None

  def state_shardings(self) -> TrainState:
    """Return where each leaf of the state lives."""
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  def init_state(self) -> TrainState:
    """Return the state of step 0, made in place on all devices."""
    return jax.jit(self.init, out_shardings=self.state_shardings())()

  def to_checkpoint(self, state: TrainState) -> TrainState:
    """Return the state with each block by itself, as a checkpoint has it."""
    return packing.unpack(state, packing.take) if self.model.packed else state

  def from_checkpoint(self, state: TrainState) -> TrainState:
    """Return the state in the form that the steps have; the inverse of `to_checkpoint`."""
    if not self.model.packed:
      return state
    return jax.jit(packing.pack, out_shardings=self.state_shardings())(state)

  @property
  def abstract_checkpoint(self) -> TrainState:
    """Shapes, dtypes and shardings of what `to_checkpoint` returns."""
    return self.to_checkpoint(self.abstract_state)

  def sizes(self, mode: Mode) -> dict[str, int]:
    """Return the image size and the batch size for a mode; in training the largest image size."""
    if mode == "replicas":
      return {"image_size": 0, "batch_size": 0}
    if mode in ("train", "recompute"):
      size, batch = max(image_sizes.distinct(self.config.data)), self.config.global_batch_size
    else:
      size, batch = self.config.data.eval_image_size, self.config.eval.batch_size
    return {"image_size": size, "batch_size": batch}

  def sizes_at(self, step: int) -> dict[str, int]:
    """Return `sizes` of the training step that follows `step` steps taken."""
    return self.sizes("train") | {"image_size": self.lengths.image_size(step)}

  def all_sizes(self, mode: Mode, step: int = 0) -> list[dict[str, int]]:
    """Return all `sizes` that a mode has after `step` steps, in the order of their first use."""
    if mode != "train":
      return [self.sizes(mode)]
    ahead = [
      size
      for first, size in self.lengths.sizes
      if step + self.lengths.offset < first < self.lengths.total
    ]
    distinct = dict.fromkeys([self.lengths.image_size(step), *ahead])
    return [self.sizes(mode) | {"image_size": size} for size in distinct]

  def abstract_totals(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what an evaluation counts, by the config."""
    fields = self.config.eval
    classes = self.config.model.num_classes if fields.per_class else 0
    return evaluate.abstract_totals(self.mesh, classes, bool(fields.real_labels))

  def lower(self, mode: Mode, *, image_size: int, batch_size: int) -> jax.stages.Lowered:
    """Trace a step for batches of this size; see trainer.step. Training donates the state.

    The comparison of replicas has no batch; see trainer.replicas.
    """
    with contextlib.ExitStack() as context:
      if self.config.model.precision != "default":  # else JAX_DEFAULT_MATMUL_PRECISION may say
        context.enter_context(jax.default_matmul_precision(self.config.model.precision))
      if self.mesh.shape["space"] > 1:  # convolutions ask for it, see trainer/models/convolution.py
        context.enter_context(jax.set_mesh(self.mesh))
      return self._lower(mode, image_size, batch_size)

  def _lower(self, mode: Mode, image_size: int, batch_size: int) -> jax.stages.Lowered:
    requests = mesh_lib.abstract_flags(self.mesh)
    if mode == "replicas":
      return replicas.make_compare(self.abstract_state, self.mesh).lower(
        self.abstract_state, requests
      )
    if mode == "recompute":
      return self._recompute(image_size, batch_size).lower(
        self.abstract_state.raw(), self._abstract_batch(mode, image_size, batch_size), requests
      )
    batch = self._abstract_batch(mode, image_size, batch_size)
    replicated = mesh_lib.replicated(self.mesh)
    if mode == "statistics":
      statistics_step = step_lib.make_statistics_step(self.model, self.config, self.mesh)
      variables = self.abstract_state.for_eval()
      shardings = jax.tree.map(lambda x: x.sharding, variables.batch_stats)
      return jax.jit(statistics_step, out_shardings=(shardings, replicated)).lower(
        variables, (variables.batch_stats, evaluate.abstract_count(self.mesh)), batch
      )
    if mode == "eval":
      eval_step = step_lib.make_eval_step(self.model, self.config, self.mesh)
      allowed = evaluate.abstract_allowed(self.mesh, self.config.model.num_classes)
      only = (allowed,) if self.config.eval.classes == "data" else ()
      return jax.jit(eval_step, out_shardings=replicated).lower(
        self.abstract_state.for_eval(), self.abstract_totals(), batch, requests, *only
      )
    train_step = step_lib.make_train_step(
      self.model,
      self.optimizer,
      self.schedule,
      self.config,
      self.mesh,
      ema_start=self.lengths.ema_start - self.lengths.offset,
      augment_until=self.lengths.augment_until,
      guarded=len({device.process_index for device in self.mesh.devices.flat}) > 1,
      sparse=self.sparse,
      teacher=self.teacher,
    )
    taught = (self.teacher.abstract(self.config, self.mesh),) if self.teacher else ()
    out_shardings = (self.state_shardings(), replicated)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings).lower(
      self.abstract_state, batch, requests, *taught
    )

  def check_eval_size(self) -> None:
    """Trace the model at the size of the evaluation, where training has another; nothing compiles.

    Raises:
      ConfigError: the model cannot take images of that size.
    """
    sizes = self.sizes("eval")
    if sizes["image_size"] in image_sizes.distinct(self.config.data):
      return
    try:
      self.lower("eval", **sizes)
    except (TypeError, ValueError) as error:
      raise ConfigError(
        f"config.data.eval_image_size is {sizes['image_size']}, which the model family "
        f"{self.config.model.name} cannot take with the parameters of "
        f"{self.sizes('train')['image_size']} px: {first_line(error)}."
      ) from error

  def _recompute(self, image_size: int, batch_size: int) -> jax.stages.Wrapped:
    """Return the comparison of gradients of what one device has of a micro-batch."""
    config = self.config.copy_and_resolve_references()
    if "bn_group" in config.model:
      config.model.bn_group = "global"
    model, _ = make_init(config, self.optimizer, 1, image_size)
    shards = mesh_lib.batch_shards(self.mesh)
    rows = max(1, batch_size // (shards * config.accumulation_steps))
    return replicas.make_recompute(config, self.mesh, model, rows)

  def compile(self, mode: Mode, *, image_size: int, batch_size: int) -> jax.stages.Compiled:
    """Compile what `lower` returns, for the devices of the mesh."""
    return self.finish(self.lower(mode, image_size=image_size, batch_size=batch_size), mode)

  def finish(self, lowered: jax.stages.Lowered, mode: Mode) -> jax.stages.Compiled:
    """Compile what was traced before.

    Raises:
      ConfigError: the compiler refuses an option of `config.compiler_options`.
    """
    platform = self.mesh.devices.flat[0].platform
    slices = mesh_lib.crosses_slices(self.mesh)
    options = compiler.options(platform, training=mode == "train", slices=slices)
    given = compiler.parse(self.config.compiler_options) if mode == "train" else {}
    try:
      return lowered.compile(options | given)
    except jax.errors.JaxRuntimeError as error:
      words = first_line(error).removeprefix("INVALID_ARGUMENT: ")
      if any(name in words for name in given):
        raise ConfigError(f"config.compiler_options, on {platform}: {words}.") from error
      raise

  def empty_batch(
    self, mode: Mode, hosts: int, *, image_size: int, batch_size: int
  ) -> dict[str, np.ndarray]:
    """Return the rows of one of so many hosts, all zero; as padding, in an evaluation."""
    batch = self._abstract_batch(mode, image_size, batch_size)
    return {
      name: np.zeros((x.shape[0] // hosts, *x.shape[1:]), x.dtype) for name, x in batch.items()
    }

  def _abstract_batch(
    self, mode: Mode, image_size: int, batch_size: int
  ) -> dict[str, jax.ShapeDtypeStruct]:
    kinds = {
      "image": ((batch_size, image_size, image_size, 3), np.uint8),
      "label": ((batch_size,), np.int32),
      "mask": ((batch_size,), np.bool_),
      "accepted": ((batch_size, self.config.model.num_classes), np.bool_),
    }
    names = BATCHES[mode]
    if mode == "eval" and self.config.eval.real_labels:
      names = (*names, "accepted")
    return {
      name: jax.ShapeDtypeStruct(
        *kinds[name], sharding=mesh_lib.batch_sharding(self.mesh, len(kinds[name][0]))
      )
      for name in names
    }


def build(
  config: ml_collections.ConfigDict,
  num_examples: int,
  devices: Sequence[jax.Device] | None = None,
  offset: int = 0,
  teacher: distill.Teacher | None = None,
) -> Program:
  """Return the program of a validated config.

  Args:
    config: the config.
    num_examples: of the training split.
    devices: instead of all of them.
    offset: see trainer.config.Durations.
    teacher: that `trainer.weights.teacher` has read, for a program that trains.
  """
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  lengths = config_lib.durations(config, num_examples, offset)
  schedule = schedules.make_schedule(
    config,
    warmup_steps=lengths.warmup,
    total_steps=lengths.total,
    per_epoch=lengths.per_epoch,
    offset=offset,
  )
  no_decay = models.family_of(config.model).NO_DECAY
  optimizer = optimizer_lib.make_optimizer(config, schedule, no_decay)
  shards = mesh_lib.batch_shards(mesh)
  model, init = make_init(config, optimizer, shards)
  shapes = jax.eval_shape(init)
  finetune.check(config, shapes.params)
  sparse = sparse_lib.make(config, shapes.params, lengths.total, offset)
  if sparse:
    init = sparse.with_masks(init, optimizer)
    shapes = jax.eval_shape(init)
  sizes = image_sizes.distinct(config.data)
  resizes = models.family_of(config.model).RESIZES
  for size in sizes if len(sizes) > 1 and not resizes else ():
    if not models.same_leaves(config.model, size, max(sizes)):
      raise ConfigError(
        f"config.data.image_sizes has {size} and {max(sizes)}, for which the model family "
        f"{config.model.name} has parameters of other shapes; give one config.data.image_size."
      )
  abstract_state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    mesh_lib.state_shardings(config, mesh, shapes),
  )
  mask = optimizer_lib.make_mask(config, no_decay)
  return Program(
    config, mesh, lengths, model, schedule, optimizer, mask, init, abstract_state, sparse, teacher
  )


def use_compilation_cache(config: ml_collections.ConfigDict, compiled: epath.Path) -> None:
  """Set where JAX keeps compiled programs, unless the environment does: `config.compilation_cache`.

  Args:
    config: a validated config.
    compiled: what "workdir" stands for.
  """
  if config.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    in_workdir = config.compilation_cache == "workdir"
    folder = str(compiled) if in_workdir else config.compilation_cache
    keep_compiled(folder)


def keep_compiled(folder: str) -> None:
  """Have JAX keep compiled programs in a folder, by keys that do not depend on its name."""
  jax.config.update("jax_compilation_cache_dir", folder)
  # By default the options of the compiler, and with them the key, have the name of a subfolder, for
  # what GPUs have tuned, which a program in the cache makes needless.
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  # Small programs too: those that hash the leaves of a checkpoint are a few dozen, quick each and
  # seconds together.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Steps:
  """The compiled steps of a program, one for each (mode, image size, batch size).

  A step that will be needed is asked for ahead by `prepare` and compiled in the background, one
  after the other in the order of asking, which is the same on all hosts.
  """

  def __init__(self, program: Program):
    self._program = program
    self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
    self._asked: dict[tuple[Mode, int, int], futures.Future[jax.stages.Compiled]] = {}
    self._lock = threading.Lock()

  def prepare(
    self, mode: Mode, *, image_size: int, batch_size: int
  ) -> futures.Future[jax.stages.Compiled]:
    """Start to compile a step in the background, unless that was asked for before."""
    with self._lock:
      key = mode, image_size, batch_size
      if key not in self._asked:
        self._asked[key] = self._thread.submit(
          self._program.compile, mode, image_size=image_size, batch_size=batch_size
        )
      return self._asked[key]

  def get(self, mode: Mode, *, image_size: int, batch_size: int) -> Callable[..., Any]:
    """Return a compiled step; waits for it, or compiles it if nobody has asked before."""
    return self.prepare(mode, image_size=image_size, batch_size=batch_size).result()

  def close(self) -> None:
    """Give up what is not being compiled yet."""
    self._thread.shutdown(wait=False, cancel_futures=True)
