"""Images for the report: of the first batch, and those that a model is most wrong about."""

import base64
from collections.abc import Sequence
import contextlib
import io
import json
from typing import Any

from absl import logging
from etils import epath
import ml_collections
import numpy as np
from PIL import Image

from input_pipeline import loader, sources
from input_pipeline.rows import Batch
from input_pipeline.sources import slices
from input_pipeline.sources.base import Subset
from trainer import data as data_lib
from trainer.errors import ConfigError
from trainer.reporting import recorded
from trainer.workdir import files, storage

_SAMPLES, _MISTAKES = 16, 24
_QUALITY = 88  # of JPEG
_BATCH = 32


def keep_samples(path: epath.Path, batch: Batch, classes: Sequence[str]) -> np.ndarray:
  """Write some images of a batch to a file, unless it is there; return them.

  Args:
    path: `Workdir.samples`.
    batch: with 'image' uint8 [N, H, W, 3] and 'label' int [N].
    classes: names by label.

  Returns:
    uint8 [at most 16, H, W, 3].
  """
  images = batch["image"][:_SAMPLES]
  try:
    if not path.exists():
      kept = [
        {"jpeg": _jpeg(image), "class": classes[label]}
        for image, label in zip(images, batch["label"].tolist())
      ]
      storage.write_whole(path, json.dumps({"images": kept}))
  # As in BucketFile: no kind of error of a bucket or a disk may end the run.
  except Exception as error:
    logging.warning("%s could not be written (%s).", path, storage.first_line(error))
  return images


def write_mistakes(workdir: str, count: int) -> None:
  """Look at images of the first evaluated split of a run, and keep the most confident mistakes.

  Args:
    workdir: folder of the run, which has weights.
    count: images, from all over the split; all of it if it has fewer.

  Raises:
    ValueError: if `count` is less than 1.
    TrainerError, DataError: if there is no config, or weights or data cannot be read.
  """
  # Imported here: a training process needs no second model.
  from trainer.predict import Predictor

  if count < 1:
    raise ValueError(f"--mistakes={count} must be 1 or more.")
  run = recorded.open_run(workdir)
  saved = files.read_json(run.config, {"model": dict})
  if saved is None:
    raise ConfigError(f"{run.path} holds no config.json; --mistakes needs the config and the data.")
  config = ml_collections.ConfigDict(saved)
  predictor = Predictor(str(run.path))
  split = slices.several(config.data.eval_split, "config.data.eval_split")[0]
  source = sources.open_source(config.data, split, config.model.num_classes, any_number=True)
  table = data_lib.label_table(predictor.classes, source, split)
  found: list[tuple[float, np.ndarray, dict[str, Any]]] = []
  with contextlib.closing(_batches(source, config.data, count)) as batches:
    for batch in data_lib.relabelled(batches, table):
      real = batch["mask"].astype(bool)
      images, labels = batch["image"][real], batch["label"][real]
      shares = predictor.probabilities(images)
      best = shares.argmax(-1)
      for i in np.flatnonzero(best != labels).tolist():
        share = float(shares[i, best[i]])
        mistake = {
          "class": predictor.classes[labels[i]],
          "predicted": predictor.classes[best[i]],
          "probability": share,
        }
        found.append((share, images[i], mistake))
      found = sorted(found, key=lambda one: -one[0])[:_MISTAKES]
  seen = min(count, len(source))
  note = f"Of {seen:,} images of {split}, {len(source):,} in all, with the newest weights."
  mistakes = [{**one, "jpeg": _jpeg(pixels)} for _, pixels, one in found]
  storage.write_whole(run.mistakes, json.dumps({"note": note, "images": mistakes}))


def _batches(source: sources.Source, data: ml_collections.ConfigDict, count: int) -> Any:
  """Return batches of `count` examples from all over a source, decoded in this process."""
  alone = data.copy_and_resolve_references()
  alone.update(workers=0, max_bad_fraction=1.0)
  if source.indexed and count < len(source):
    source = Subset(source, np.linspace(0, len(source) - 1, count).astype(int).tolist())
  return loader.eval_batches(source, alone, batch_size=_BATCH)


def _jpeg(image: np.ndarray) -> str:
  """Return uint8 [H, W, 3] as JPEG in base64."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
  return base64.b64encode(file.getvalue()).decode()
