"""What a run will be, before anything runs: python -m trainer.plan --config=X [options]

Prints model, length, learning rate, image sizes, augmentation, evaluations and work of a run.

--examples           training examples, where the data are not at hand
--images_per_second  of all chips in training, for the hours
--picture            FILE.png of the learning rate and the image size over the epochs
--table              every recipe of configs/ as a row of a table instead
"""

from collections.abc import Iterator
import dataclasses
import functools
import sys

from absl import flags
import jax
import ml_collections
import numpy as np
import optax

from configs import base, image_sizes, recipes
from input_pipeline import sources
from input_pipeline.errors import DataError
from trainer import command_line, distill, mesh, models, schedules
from trainer import config as config_lib
from trainer.errors import DONE, FAILED, ConfigError, TrainerError
from trainer.reporting import flops
from trainer.reporting.clock import format_seconds
from trainer.sparse import method as sparse_lib
from trainer.sparse import show as sparse_show
from trainer.state import Model, Variables, make_init
from trainer.weights import teacher as teacher_lib

FLAGS = flags.FLAGS
flags.DEFINE_integer("examples", 0, "Training examples.", lower_bound=0)
flags.DEFINE_float("images_per_second", 0.0, "Of all chips in training.", lower_bound=0.0)
flags.DEFINE_string("picture", "", "FILE.png of rate and image size.")
flags.DEFINE_bool("table", False, "Every recipe of configs/ as a row of a table.")

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # characters of the curve
_POINTS = 1000  # of the picture


@dataclasses.dataclass(frozen=True)
class Plan:
  """The figures of a run.

  Attributes:
    examples: of the training split.
    lengths: every duration in steps.
    steps: int [points], steps at which the curves are read, from the first to the last.
    rates: float [points], learning rate at each.
    sizes: int [points], height and width of training images at each, in pixels.
    params: trained values.
    forward_flops: of one image at the largest size.
    train_flops: of the whole run.
    sparse: which weights are zero; None if none are.
    teacher: that the run learns from; None if there is none, or the config does not name it yet.
  """

  config: ml_collections.ConfigDict
  examples: int
  lengths: config_lib.Durations
  steps: np.ndarray
  rates: np.ndarray
  sizes: np.ndarray
  params: int
  forward_flops: int
  train_flops: float
  sparse: sparse_lib.Sparse | None = None
  teacher: distill.Teacher | None = None

  @property
  def images(self) -> int:
    """Training images that the run computes, each as often as it is seen."""
    return self.lengths.total * self.config.global_batch_size

  @property
  def evaluations(self) -> int:
    """Evaluations, the last among them."""
    total, every = self.lengths.total, self.lengths.eval_every
    return -(-total // every) if every else 1


def make(config: ml_collections.ConfigDict, name: str, examples: int = 0) -> Plan:
  """Return the plan of a config; computes nothing on a device.

  Args:
    config: the run.
    name: of its run file.
    examples: of the training split; 0 takes them from the data, or those of the recipe.

  Raises:
    ConfigError: if the config is refused, or the number of examples cannot be found.
  """
  config_lib.validate(config)
  examples = examples or _examples(config, name)
  lengths = config_lib.durations(config, examples)
  schedule = schedules.make_schedule(
    config, warmup_steps=lengths.warmup, total_steps=lengths.total, per_epoch=lengths.per_epoch
  )
  even = np.linspace(0, lengths.total - 1, _POINTS).astype(np.int32)
  steps = np.unique([*even, lengths.warmup])
  rates = np.asarray(jax.vmap(schedule)(steps))
  sizes = np.array([image_sizes.at(lengths.sizes, int(step)) for step in steps])
  net = ml_collections.FrozenConfigDict(config.model), int(max(image_sizes.distinct(config.data)))
  _, variables = _traced(*net)
  teacher = teacher_lib.read(config) if config.distill.teacher else None
  own = {int(size): _flops(*net, int(size), config.optimizer.freeze) for size in set(sizes)}
  each = {
    size: training + flops.teacher_flops(teacher, size) for size, (_, training) in own.items()
  }
  work = [(first, config.global_batch_size * each[size]) for first, size in lengths.sizes]
  return Plan(
    config,
    examples,
    lengths,
    steps,
    rates,
    sizes,
    params=sum(x.size for x in jax.tree.leaves(variables.params)),
    forward_flops=own[int(sizes.max())][0],
    train_flops=flops.Work(work).between(0, lengths.total),
    sparse=sparse_lib.make(config, variables.params, lengths.total),
    teacher=teacher,
  )


# Many recipes of the table have one net.
@functools.lru_cache(maxsize=64)
def _traced(fields: ml_collections.FrozenConfigDict, image_size: int) -> tuple[Model, Variables]:
  """Return a net and its abstract variables, by its `config.model` and its largest images."""
  config = base.get_config(fields.name)
  config.model = ml_collections.ConfigDict(fields)
  model, init = make_init(config, optax.identity(), shards=1, image_size=image_size)
  return model, jax.eval_shape(init).for_eval()


@functools.lru_cache(maxsize=64)
def _flops(
  fields: ml_collections.FrozenConfigDict, largest: int, image_size: int, freeze: str
) -> tuple[int, int]:
  """Return the FLOPs of an image, of its forward pass and in a training step."""
  return flops.image_flops(*_traced(fields, largest), image_size, freeze)


def _examples(config: ml_collections.ConfigDict, name: str) -> int:
  data = config.data
  if data.path or data.kind == "synthetic":
    try:
      return len(sources.open_source(data, data.train_split, config.model.num_classes or None))
    except DataError as error:
      raise ConfigError(f"{error} Or give --examples.") from error
  if name.partition(":")[0] in {recipe.partition(":")[0] for recipe in recipes.names()}:
    return recipes.examples(name)
  raise ConfigError("Give --config.data.path, or --examples: how many there are to train on.")


def text(plan: Plan, images_per_second: float = 0.0) -> str:
  """Return the plan for a person, as lines."""
  config, lengths, optimizer = plan.config, plan.lengths, plan.config.optimizer
  data, end = config.data, lengths.total / lengths.per_epoch
  family = models.family_of(config.model).describe(models.own_fields(config.model))
  crop = {
    "random_resized": f"crops of {data.crop_area[0]:g} to {data.crop_area[1]:g} of the area",
    "padded": f"crops after {data.crop_padding} px of padding",
    "none": "no crop",
  }[data.crop]
  host = [crop, "flip" if data.flip else "no flip", f"{data.interpolation} interpolation"]
  host += [data.operations] if data.operations else []
  host += [f"each image {data.repeats} times in a row"] if data.repeats > 1 else []
  peak = int(np.argmax(plan.rates))
  rate = (
    f"{_first_rate(plan.rates[0])}, {plan.rates[peak]:.3g} at epoch "
    f"{plan.steps[peak] / lengths.per_epoch:.3g}, {plan.rates[-1]:.3g} at last"
  )
  freezes = bool(config.optimizer.freeze)
  passes = "forward pass and needed gradients of" if freezes else "3 forward passes"
  lines = {
    "model": f"{family}, {plan.params:,} parameters, {plan.forward_flops / 2e9:.3g} G multiply-adds"
    f" an image at {plan.sizes.max()} px",
    "data": f"{plan.examples:,} examples to train",
    "length": f"{lengths.total:,} steps of {config.global_batch_size:,}, {end:.4g} epochs, "
    f"{plan.images:,} images",
    "optimizer": f"{optimizer.name}, weight decay {optimizer.weight_decay:g}",
    "schedule": f"{optimizer.schedule}, {lengths.warmup:,} steps of warm-up",
    "rate": rate,
    "": _curve(plan.rates),
    "sizes": f"{_sizes(plan)} px; evaluated at {data.eval_image_size} px of "
    f"{data.eval_resize or 'unchanged'}",
    "loss": f"{config.loss}, label smoothing {config.label_smoothing:g}",
    "host": ", ".join(host),
    "device": config.augment or "nothing",
    "averages": _averages(config),
    "evaluated": f"{plan.evaluations} times, on {data.eval_split}",
    "work": f"{plan.train_flops / 1e18:.3g} EFLOP to train ({passes} an image, 2 for each "
    "multiply-add)",
  }
  if plan.sparse:
    lines["sparsity"] = sparse_show.line(plan.sparse)
  if config.distill.weight:
    fields = config.distill
    named = plan.teacher or "none is named yet, and its work not counted"
    lines["teacher"] = f"weight {fields.weight:g}, temperature {fields.temperature:g}: {named}"
  if images_per_second:
    seconds = plan.images / images_per_second
    lines["time"] = f"{format_seconds(seconds)} at {images_per_second:,.0f} images/s, without start"
    lines["time"] += ", evaluations and saves"
  return "\n".join(f"{name:10} {line}" for name, line in lines.items())


def table() -> Iterator[str]:
  """Yield the lines of a table of every recipe: that of configs/README.md."""
  head = ["recipe", "epochs", "batch", "steps", "images", "px, training / evaluation"]
  head += ["optimizer, peak rate", "EFLOP", "expected top-1"]
  yield f"| {' | '.join(head)} |"
  yield f"|{'---|' * len(head)}"
  for name in recipes.names():
    yield row(make(recipes.load(name), name), name)


def row(plan: Plan, name: str) -> str:
  """Return the plan of a recipe as a row of a table."""
  config = plan.config
  cells = [
    f"`{name}`",
    f"{float(f'{plan.lengths.total / plan.lengths.per_epoch:.3g}'):g}",
    f"{config.global_batch_size:,}",
    f"{plan.lengths.total:,}",
    f"{plan.images / 1e6:,.4g} M",
    f"{_sizes(plan)} / {config.data.eval_image_size}",
    f"{config.optimizer.name}, {plan.rates.max():.3g}",
    f"{plan.train_flops / 1e18:.3g}",
    recipes.top1(name),
  ]
  return "| " + " | ".join(cells) + " |"


def write_picture(plan: Plan, path: str) -> None:
  """Draw learning rate and image size over the epochs."""
  from matplotlib import figure

  drawing = figure.Figure(figsize=(8, 3), layout="constrained")
  rate, size = drawing.subplots(1, 2)
  epochs = plan.steps / plan.lengths.per_epoch
  for axes, values, title in ((rate, plan.rates, "learning rate"), (size, plan.sizes, "pixels")):
    axes.step(epochs, values, where="post")
    axes.set(xlabel="epoch", title=title, ylim=(0, None))
  drawing.savefig(path)


def _first_rate(rate: float) -> str:
  if rate:
    return f"{rate:.3g} at first"
  return "0 at first (that step changes no weight; optimizer.warmup_start)"


def _sizes(plan: Plan) -> str:
  parts = []
  for first, size in plan.lengths.sizes:
    epoch = first / plan.lengths.per_epoch
    parts.append(f"{size}" if not first else f"{size} from epoch {epoch:.3g}")
  return ", ".join(parts)


def _averages(config: ml_collections.ConfigDict) -> str:
  fields = config.optimizer
  if not fields.ema_decay:
    return "none"
  return (
    f"decay {fields.ema_decay:.6g} every {fields.ema_every_steps} steps from epoch "
    f"{fields.ema_start_epochs:g} on ({fields.ema_rule})"
  )


def _curve(values: np.ndarray) -> str:
  """Return a line of blocks of rising height, each the mean of its part of the values."""
  means = [part.mean() for part in np.array_split(values, min(_WIDTH, len(values)))]
  top = max(means) or 1.0
  return "".join(_BARS[round(mean / top * (len(_BARS) - 1))] for mean in means)


def main(argv: list[str]) -> int:
  """Print the plan; return an exit code of trainer.errors."""
  try:
    if command_line.answered(argv, __doc__):
      return DONE
    mesh.device_count()
    if "--table" in argv:
      for line in table():  # two minutes on one core
        print(line, flush=True)
      return DONE
    command_line.parse(argv, "--config=configs/X.py")
    plan = make(FLAGS.config, command_line.name_of(argv), FLAGS.examples)
    print(text(plan, FLAGS.images_per_second))
    if FLAGS.picture:
      write_picture(plan, FLAGS.picture)
  except (TrainerError, OSError) as error:
    print(error, file=sys.stderr)
    return FAILED
  return DONE
