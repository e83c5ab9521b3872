"""Models by name: `create` builds that of `config.model`; `configs.families` lists them."""

from typing import TYPE_CHECKING, Any

import ml_collections

from configs import families
from configs.fields import problem

if TYPE_CHECKING:  # the tables of fields in this package are read without JAX
  from flax import nnx

  from trainer.models.family import Family

_COMMON = ("name", "num_classes", "dtype", "precision")  # fields of every family


def family_of(model_config: ml_collections.ConfigDict) -> "type[Family]":
  """Return the family of `config.model`.

  Raises:
    ValueError: one sentence, if there is none of that name, or it is no family.
  """
  from trainer.models.family import Family

  family = families.find(model_config.name)
  if not (isinstance(family, type) and issubclass(family, Family)):
    raise ValueError(
      f"config.model.name is {model_config.name!r}, which is no trainer.models.family.Family."
    )
  return family


def own_fields(model_config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return the fields that belong to the family alone."""
  return {name: value for name, value in dict(model_config).items() if name not in _COMMON}


def check(model_config: ml_collections.ConfigDict) -> None:
  """Check, without building anything, that `create` can build such a model.

  Raises:
    ValueError: one sentence that names the field and what it may be.
  """
  family, values = family_of(model_config), own_fields(model_config)
  for name, field in family.FIELDS.items():
    if name in values and (trouble := problem(f"model.{name}", field, values[name])):
      raise ValueError(trouble)
  family.check(values)


def check_image(
  model_config: ml_collections.ConfigDict, *, name: str, size: int, space: int
) -> None:
  """Check that such a model can take images of a size; see Family.check_image.

  Raises:
    ValueError: one sentence that begins with the name.
  """
  family_of(model_config).check_image(own_fields(model_config), name=name, size=size, space=space)


def create(
  model_config: ml_collections.ConfigDict, *, image_size: int, rngs: "nnx.Rngs", shards: int = 1
) -> "Family":
  """Return a new model: float [N, H, W, 3] -> float32 logits [N, num_classes].

  With the dtype float64 logits and state are float64.

  Args:
    model_config: `config.model`.
    image_size: height and width of training images, in pixels.
    rngs: with the stream `params`, from which all parameters are drawn.
    shards: parts that the examples of a batch are split in over devices.

  Raises:
    ValueError: as `check`.
  """
  check(model_config)
  return family_of(model_config).build(
    own_fields(model_config),
    num_classes=model_config.num_classes,
    dtype=model_config.dtype,
    image_size=image_size,
    shards=shards,
    rngs=rngs,
  )


def same_leaves(model_config: ml_collections.ConfigDict, *image_sizes: int) -> bool:
  """Whether such a model has the same variables, in the same shapes, for all these image sizes.

  Nothing is computed.
  """
  from flax import nnx
  import jax

  from trainer.models.rngs import streams

  def leaves(image_size: int) -> Any:
    def variables() -> Any:
      model = create(model_config, image_size=image_size, rngs=streams(default=jax.random.key(0)))
      return nnx.to_pure_dict(nnx.state(model))

    return jax.eval_shape(variables)

  first, *others = map(leaves, image_sizes)
  return all(other == first for other in others)
