"""ReaL: all classes that each validation image of ImageNet shows (arXiv:2006.07159).

The file is `real.json` of the authors: a list by number of the image, each a list of labels, in the
order of sorted WordNet ids. An answer is right if it is one of them; images without any do not
count.
"""

from collections.abc import Iterable, Iterator
import json

import numpy as np

from trainer.errors import ConfigError
from trainer.workdir import storage


def read(path: str, classes: int) -> np.ndarray:
  """Return bool [images, classes]: which answers are right.

  Args:
    path: of the file, local or gs://.
    classes: of the model.

  Raises:
    ConfigError: if there is none, or it holds something else.
    StorageError: if it cannot be read.
  """
  field = f"config.eval.real_labels={path}"
  try:
    labels = json.loads(storage.path_of(path).read_text())
  except FileNotFoundError as error:
    raise ConfigError(f"{field}: there is no such file.") from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{field} cannot be read ({storage.first_line(error)}).") from error
  except Exception as error:
    if not storage.is_failure(error):
      raise
    raise storage.failed(f"{field} cannot be read", error) from error
  if not (isinstance(labels, list) and labels and all(isinstance(own, list) for own in labels)):
    raise ConfigError(f"{field} is no list of lists of labels, such as real.json.")
  table = np.zeros((len(labels), classes), np.bool_)
  for number, own in enumerate(labels, 1):
    if not all(isinstance(label, int) and 0 <= label < classes for label in own):
      raise ConfigError(
        f"{field} has {own!r} for image {number}; labels are numbers below "
        f"config.model.num_classes={classes}."
      )
    table[number - 1, own] = True
  return table


def accepted(
  batches: Iterable[dict[str, np.ndarray]], table: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
  """Yield batches with `accepted`, bool [rows, classes], looked up by the number of each image.

  Raises:
    ConfigError: if an image has no number, or one that is not in the table.
  """
  for batch in batches:
    numbers, real = batch["number"], batch["mask"]
    if (wrong := numbers[real & ((numbers < 1) | (numbers > len(table)))]).size:
      raise ConfigError(
        "config.eval.real_labels needs the validation images of ILSVRC2012 under their own names, "
        f"ILSVRC2012_val_00000001.JPEG to {len(table):08d}; one has "
        + (f"the number {wrong[0]}." if wrong[0] > 0 else "another name.")
      )
    rows = table[np.where(real, numbers, 1) - 1] & real[:, None]
    yield batch | {"accepted": rows}
