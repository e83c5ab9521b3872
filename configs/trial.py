"""A recipe made so small that a CPU runs all of it in a minute: --trial.

Optimizer, schedule, losses, augmentation and every duration in epochs stay those of the recipe; the
net, its images and its batches shrink. It shows that a recipe, the data and the machine fit
together, before a long run does.
"""

import re

import ml_collections

from configs import families

BATCH = 8
_SIZE, _MARGIN = 32, 4  # pixels
_CLASSES = 10  # where the data would have said
_LOG_EVERY = 10  # steps, of real data; synthetic ones have few
WARMUP = 10  # of a run that is shorter than its warm-up, the part that warms up


def shrink(config: ml_collections.ConfigDict) -> None:
  """Shrink a config in place; without `config.data.path` an epoch is one synthetic batch."""
  config.global_batch_size = config.eval.batch_size = BATCH * config.accumulation_steps
  config.augment = _smaller_groups(config.augment)
  for name, value in families.find(config.model.name).TRIAL.items():
    config.model[name] = value
  if config.model.get("bn_group", "").isdigit():
    config.model.bn_group = str(min(BATCH, int(config.model.bn_group)))

  data = config.data
  sizes = sorted({int(size) for size in re.findall(r":\s*(\d+)", data.image_sizes)})
  data.image_sizes = re.sub(
    r":\s*(\d+)", lambda m: f":{_SIZE + 8 * sizes.index(int(m[1]))}", data.image_sizes
  )
  data.image_size = data.eval_image_size = _SIZE
  data.eval_resize = data.eval_resize and _SIZE + _MARGIN
  data.workers = 0
  data.stream_lanes = BATCH
  if not data.path:
    data.kind, data.synthetic_examples = "synthetic", config.global_batch_size
    config.model.num_classes = config.model.num_classes or _CLASSES
    cut_warmup(config, config.total_steps or int(config.total_epochs))
  if not config.distill.teacher:
    config.distill.weight = 0.0  # without the teacher of a recipe, the labels alone
  config.log.every_steps = _LOG_EVERY if data.path else 1


def cut_warmup(config: ml_collections.ConfigDict, total: int) -> bool:
  """Cut a warm-up in steps, in place, if it is as long as a run of `total` steps or longer.

  Returns:
    Whether it was.
  """
  if config.optimizer.warmup_steps < total:
    return False
  config.optimizer.warmup_steps = total // WARMUP
  return True


def _smaller_groups(chain: str) -> str:
  return re.sub(r"group=(\d+)", lambda m: f"group={min(BATCH, int(m[1]))}", chain)
