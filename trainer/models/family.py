"""What a model family brings: its fields with their checks and words, and how it is built."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx
import jax
import numpy as np

from configs.fields import Fields
from trainer.models import norm
from trainer.models.names import Looks


class StepsTaken(nnx.Variable[Any]):
  """Steps that the run has taken with the one being computed; int32, a part of the state.

  A training step sets it, and what is evaluated later has the last one. A model that was not
  trained has ENDLESS.
  """


class AuxiliaryLoss(nnx.Variable[Any]):
  """A scalar that a model in training mode adds to the loss; see `sow`."""


class Metric(nnx.Variable[Any]):
  """A scalar that a model in training mode has for the curves; see `sow` and Family.METRICS."""


ENDLESS = np.iinfo(np.int32).max


class Sown(NamedTuple):
  """What a model left behind in a training step.

  Attributes:
    losses: scalars.
    metrics: scalars by name.
  """

  losses: list[jax.Array]
  metrics: dict[str, jax.Array]


def sow(model: nnx.Module, kind: type[nnx.Variable[Any]], name: str, value: jax.Array) -> None:
  """Leave a scalar behind for the training step, in place of that of the call before.

  Args:
    model: the whole model, not a part of it.
    kind: AuxiliaryLoss or Metric.
    name: no other attribute of the model has it.
    value: mean over the examples.
  """
  # Module.sow of flax 0.12.8 warns that it is for calls inside nnx.capture.
  setattr(model, name, kind(value))


def reap(model: nnx.Module) -> Sown:
  """Take what a model has sown out of it, so that it does not become a part of the state."""
  losses = nnx.to_pure_dict(nnx.pop(model, AuxiliaryLoss))
  return Sown(list(losses.values()), nnx.to_pure_dict(nnx.pop(model, Metric)))


def set_steps_taken(model: nnx.Module, steps: jax.Array) -> None:
  """Set all StepsTaken of a model, an int32 scalar."""
  for _, node in nnx.iter_graph(model):
    if isinstance(node, StepsTaken):
      node.set_value(steps)


class Family(nnx.Module):
  """A model that a config can name; see `configs.families`.

  A model turns floating point images [N, H, W, 3] into float32 logits [N, num_classes] (float64 if
  its dtype is). `train()` and `eval()` choose its mode. Its state may hold parameters (nnx.Param),
  running statistics (nnx.BatchStat), variables of any other kind, and random streams, which are
  seeded anew in each step. All names of its state are strings.

  Attributes:
    FIELDS: what a config may set in its section `model`, beside name, num_classes, dtype and
      precision.
    TRIAL: values of FIELDS that make the smallest net of all its parts, for --trial.
    NO_DECAY: regular expressions of matrices without weight decay, searched for in their path;
      vectors never decay.
    RESIZES: whether a model takes images of other sizes than that which it was made for, though its
      parameters depend on that one.
    METRICS: names of what it sows as Metric in every training step.
    CONVOLUTIONS: regular expression of names of `torch_name`, of matrices here that are 1x1
      convolutions in a state dict.
  """

  FIELDS: ClassVar[Fields] = {}
  TRIAL: ClassVar[Mapping[str, Any]] = {}
  NO_DECAY: ClassVar[tuple[str, ...]] = ()
  RESIZES: ClassVar[bool] = False
  METRICS: ClassVar[tuple[str, ...]] = ()
  CONVOLUTIONS: ClassVar[str] = ""

  @classmethod
  def check(cls, fields: Mapping[str, Any]) -> None:
    """Refuse values that are fine by themselves and do not fit together.

    Args:
      fields: values of FIELDS.

    Raises:
      ValueError: one sentence that names the fields as in "config.model.depth".
    """

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse a height and width of images that the model cannot take.

    Args:
      fields: values of FIELDS.
      name: of the field that has it, as in "config.data.image_size".
      size: in pixels.
      space: parts that the height is split in over devices; they divide it.

    Raises:
      ValueError: one sentence that begins with the name.
    """

  @classmethod
  def check_split(cls, fields: Mapping[str, Any], *, examples: int, shards: int) -> None:
    """Refuse values that do not fit the batch or its split over devices.

    Args:
      fields: values of FIELDS.
      examples: of a micro-batch, over all devices.
      shards: parts that they are split in over devices.

    Raises:
      ValueError: one sentence that names the field.
    """

  @classmethod
  def build(
    cls,
    fields: Mapping[str, Any],
    *,
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    image_size: int,
    shards: int,
    rngs: nnx.Rngs,
  ) -> Self:
    """Return a new model. By default the constructor takes all of this but size and shards.

    Args:
      fields: values of FIELDS.
      num_classes: length of the logits.
      dtype: of activations; parameters are float32, or float64 with it.
      image_size: height and width of training images, in pixels.
      shards: parts that the examples of a batch are split in over devices.
      rngs: with the stream `params`, from which all parameters are drawn, and any other.
    """
    del image_size, shards
    constructor: Callable[..., Self] = cls
    return constructor(**fields, num_classes=num_classes, dtype=dtype, rngs=rngs)

  @classmethod
  def for_micro_batches(
    cls, params: Mapping[str, Any], batch_stats: Mapping[str, Any], fields: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Return parameters in the form in which the loop over micro-batches of a step has them.

    What a model does with a parameter first, such as to pad it, is then done once and not in every
    round. More than that: its gradient is summed over micro-batches in that form. Where nothing
    lies between its sum over devices and that over micro-batches, the compiler of TPUs moves the
    former behind the loop. By default vectors of batch norms are rows with `bn_together`.

    Args:
      params: nested dict of arrays.
      batch_stats: likewise.
      fields: values of FIELDS.
    """
    return norm.as_rows(params, batch_stats) if fields.get("bn_together") else dict(params)

  @classmethod
  def torch_name(cls, leaf: str, fields: Mapping[str, Any]) -> str:
    """Return the name of a leaf in a state dict of torchvision or timm; by default its own.

    Args:
      leaf: path in params or batch_stats, as in "stage1_block1/conv1/kernel". No two leaves of a
        model have the same name.
      fields: values of FIELDS.
    """
    del fields
    return leaf.replace("/", ".")

  @classmethod
  def respell(cls, tensors: Mapping[str, np.ndarray], library: str) -> dict[str, np.ndarray]:
    """Return a state dict as another library has it; nothing if it is of no net that differs there.

    Args:
      tensors: by the other one's names, in torch's layout.
      library: "timm", for the names of `torch_name`, or "torchvision".
    """
    del tensors, library
    return {}

  @classmethod
  def guess(cls, shapes: Mapping[str, tuple[int, ...]]) -> Looks | None:
    """Return which net of this family a state dict is of; None for none.

    Args:
      shapes: of its tensors in torch's layout, by the names of `torch_name`.
    """
    del shapes
    return None

  @classmethod
  def resize(
    cls, leaf: str, array: np.ndarray, shape: tuple[int, ...], fields: Mapping[str, Any]
  ) -> np.ndarray | None:
    """Return a leaf of a model for another image size as this model has it; None if it has no such.

    Args:
      leaf: path in params or batch_stats.
      array: its values there, in our layout.
      shape: that it has here.
      fields: values of FIELDS.
    """
    del leaf, array, shape, fields
    return None

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return the name of the model, and the values that are not the default."""
    return cls.titled(cls.__name__, fields)

  @classmethod
  def titled(cls, title: str, fields: Mapping[str, Any], *said: str) -> str:
    """Return a title, and the values that are not the default, but for the fields that it says."""
    changed = [
      f"{n} {v}"
      for n, v in fields.items()
      if n in cls.FIELDS and n not in said and v != cls.FIELDS[n].default
    ]
    return ", ".join([title, *changed])
