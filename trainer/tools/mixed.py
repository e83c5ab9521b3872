"""Draw the first training images of a run as the model gets them, mixed and erased.

    python -m trainer.mixed --config=configs/X.py --config.data.path=DATA [--out=FILE.png]
        [--images=N] [--config.field=value ...]

Under each image are the largest shares of its target. They are the first images of the first
micro-batch of the run, all of which is loaded.
"""

import contextlib
import sys

from absl import flags, logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from input_pipeline import loader, sources
from input_pipeline.errors import DataError
from input_pipeline.tools import contact_sheet
from trainer import augment, command_line, mesh
from trainer import config as config_lib
from trainer import data as data_lib
from trainer.errors import TrainerError
from trainer.state import step_key

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "mixed.png", "Picture to write.")
flags.DEFINE_integer("images", 32, "Images to show.", lower_bound=1)


def main(argv: list[str]) -> int:
  """Run the command; return its exit code."""
  logging.set_verbosity(logging.WARNING)
  try:
    if command_line.answered(argv, __doc__):
      return 0
    command_line.parse(argv, "--config=configs/X.py")
    mesh.device_count()
    section = draw_section(FLAGS.config, FLAGS.images)
  except (TrainerError, DataError) as error:
    print(f"mixed: {error}", file=sys.stderr)
    return 2
  contact_sheet.draw([section])[0].save(FLAGS.out)
  print(f"{section.title}: {FLAGS.out}")
  return 0


def draw_section(config: ml_collections.ConfigDict, count: int) -> contact_sheet.Section:
  """Return the first `count` images of the first micro-batch, with their targets in words."""
  config_lib.validate(config)
  config = data_lib.with_classes(config)
  source = sources.open_source(config.data, config.data.train_split, config.model.num_classes)
  with contextlib.closing(
    loader.train_batches(
      source, config.data, seed=config.seed, global_batch_size=config.global_batch_size
    )
  ) as batches:
    batch = {name: rows[:: config.accumulation_steps] for name, rows in next(batches).items()}
  key, _ = jax.random.split(step_key(config.seed, jnp.int32(0), 0))
  inputs = jax.jit(augment.make_inputs(config))
  images, targets = inputs(key, {name: batch[name] for name in ("image", "label")}, jnp.int32(0))
  images, targets = np.asarray(images[:count], np.float32), np.asarray(targets[:count])
  pixels = images * np.array(config.data.std) + np.array(config.data.mean)
  captions = [
    " + ".join(
      f"{target[label]:.2f} {source.class_names[label]}"
      for label in np.argsort(-target, kind="stable")[:3]
      if target[label] > 0
    )
    for target in targets
  ]
  title = f"{config.augment or 'no augmentation on the device'}, seed {config.seed}"
  shown = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
  return contact_sheet.Section(title, shown, captions, batch["bad"][:count])
