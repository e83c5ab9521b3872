"""Models by name: `create` builds that of `config.model`, `check` only looks whether it exists."""

from flax import nnx
import ml_collections

from trainer.models.resnet import CifarResNet, ResNet

MODELS = {"resnet": ResNet, "cifar_resnet": CifarResNet}


def check(model_config: ml_collections.ConfigDict):
  """Checks, without building anything, that `create` knows such a model.

  Args:
    model_config: `config.model`.

  Raises:
    ValueError: one sentence that names the field and what it may be.
  """
  if model_config.name not in MODELS:
    raise ValueError(f"config.model.name: there are {', '.join(MODELS)}; got {model_config.name}")
  MODELS[model_config.name].check_depth(model_config.depth)


def create(
  model_config: ml_collections.ConfigDict, *, rngs: nnx.Rngs, shards: int = 1
) -> nnx.Module:
  """Returns a new model: float [N, H, W, 3] -> float32 logits [N, num_classes].

  Its state is nnx.Param and nnx.BatchStat only, with string keys throughout, all float32. With the dtype float64 so are
  state and logits.

  Args:
    model_config: `config.model`.
    rngs: with a `params` stream, from which all parameters are drawn.
    shards: number of parts that the examples of a batch are split in over devices, for `bn_group`.

  Raises:
    ValueError: as `check`.
  """
  check(model_config)
  arguments = dict(model_config)
  return MODELS[arguments.pop("name")](
    arguments.pop("depth"), rngs=rngs, shards=shards, **arguments
  )
