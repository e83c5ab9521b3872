"""What a model sees in images: their most probable classes.

  python -m trainer.predict runs/r50 photos/cat.jpg photos/dogs
  python -m trainer.predict r50.safetensors photos --csv=photos.csv --sheet=photos.png
  python -m trainer.predict resnet50-0676ba61.pth cat.jpg --config=configs/imagenet_resnet50.py

Weights are a workdir, or any file that trainer.weights reads; one that no run of this program has
written needs the --config of its model. Images are prepared as an evaluation prepares them. It runs
on the CPU unless JAX_PLATFORMS names another device.

The exit code is 0; 3 if images were skipped, each with the reason; 2 with the reason in one
sentence if nothing could be done.
"""

# ruff: noqa: E402 (help comes before the slow imports)

import argparse
import sys

from configs import arguments


def _parser() -> arguments.Parser:
  parser = arguments.Parser(
    prog="python -m trainer.predict",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "weights", type=arguments.path, metavar="WORKDIR|FILE", help="workdir, or file of weights"
  )
  parser.add_argument(
    "images", type=arguments.path, metavar="IMAGE|FOLDER", nargs="+", help="images, folders of them"
  )
  parser.add_argument(
    "--config",
    metavar="X.py",
    help="run file of foreign weights; single fields by --config.FIELD=VALUE",
  )
  parser.add_argument(
    "--classes", type=arguments.path, metavar="F", help="class names, one a line or as JSON"
  )
  parser.add_argument("--top", type=int, default=5, metavar="N", help="classes of an image (5)")
  parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
  parser.add_argument(
    "--csv", type=arguments.path, metavar="F", help="write a row for each image, instead of a table"
  )
  parser.add_argument(
    "--sheet", type=arguments.path, metavar="F.png", help="draw the images with their best class"
  )
  parser.add_argument(
    "--averages",
    choices=("ema", "raw"),
    default="ema",
    help="where there are both: averages over steps, as evaluation uses them (default), or raw",
  )
  return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
  _parser().parse_args()  # ends here

from collections.abc import Iterator, Sequence
from concurrent import futures
import csv
import dataclasses
import json
import os
import pathlib
from typing import Any

# Predictions must not take an accelerator from a run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from configs.names import counted
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.sources import layout
from input_pipeline.tools import contact_sheet
from trainer import command_line, compiler
from trainer import config as config_lib
from trainer.errors import DONE, FAILED, TrainerError
from trainer.weights import about as about_lib
from trainer.weights import images as image_files
from trainer.weights import read
from trainer.weights.errors import WeightsError

SKIPPED = 3  # exit code
_BATCH = 32
_MOST_ON_SHEET = 200


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model sees in an image.

  Attributes:
    image: its path.
    labels: the most probable classes, best first.
    probabilities: theirs.
    error: why there are none; else "".
  """

  image: str
  labels: tuple[int, ...] = ()
  probabilities: tuple[float, ...] = ()
  error: str = ""


class Predictor:
  """A model with its weights, compiled for one size of batch.

  Attributes:
    classes: names by label.
  """

  def __init__(self, origin: str, averaged: bool = True, config: Any = None):
    """Read weights; the arguments are those of `trainer.weights.read.read_model`."""
    self._net, leaves, about = read.read_model(origin, averaged, config)
    self._variables = jax.tree.map(jnp.asarray, self._net.variables(leaves))
    self._logits = compiler.jit(self._net.logits_of_pixels)
    self.classes = about.classes or tuple(f"class {i}" for i in range(self.num_classes))
    self._sigmoid = self._net.config.loss.startswith("sigmoid")

  @property
  def num_classes(self) -> int:
    """Length of the logits."""
    return int(self._net.config.model.num_classes)

  def name_classes(self, names: tuple[str, ...], named: str) -> None:
    """Take other names, one for each class; `named` is what a message calls them."""
    about_lib.check_classes(names, self._net.config.model, named)
    self.classes = names

  def probabilities(self, pixels: np.ndarray) -> np.ndarray:
    """Return float32 [N, classes] for uint8 [N, S, S, 3], at most a batch.

    They add up to 1, except where config.loss is sigmoid_cross_entropy: each class has its own.
    """
    padded = np.zeros((_BATCH, *pixels.shape[1:]), np.uint8)
    padded[: len(pixels)] = pixels
    logits = self._logits(self._variables, padded)[: len(pixels)]
    return np.asarray(jax.nn.sigmoid(logits) if self._sigmoid else jax.nn.softmax(logits))

  def predict(
    self, files: Sequence[pathlib.Path], top: int
  ) -> Iterator[tuple[Prediction, np.ndarray | None]]:
    """Yield, in the order of the files, what each shows, and the pixels that the model has had.

    Files that are no images, or have no finite logits, have an error and no pixels.
    """
    with futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        views = list(pool.map(self._view, batch))
        good = [view for view in views if isinstance(view, np.ndarray)]
        found = iter(self.probabilities(np.stack(good)) if good else ())
        for file, view in zip(batch, views, strict=True):
          if isinstance(view, str):
            yield Prediction(str(file), error=view), None
            continue
          values = next(found)
          if not np.isfinite(values).all():
            yield Prediction(str(file), error="the model returns no finite numbers for it"), None
            continue
          best = np.argsort(-values, kind="stable")[:top]
          labels, shares = map(int, best), map(float, values[best])
          yield Prediction(str(file), tuple(labels), tuple(shares)), view

  def _view(self, file: pathlib.Path) -> np.ndarray | str:
    try:
      return image_files.view(file.read_bytes(), self._net)
    except (BadRecordError, DataError) as error:
      return str(error)
    except OSError as error:
      return f"cannot be read ({error.strerror})"


def find(paths: Sequence[str]) -> list[pathlib.Path]:
  """Return the files that are named, and the images of the folders that are named.

  Raises:
    WeightsError: if there is no such file, or a folder holds no image.
  """
  files: list[pathlib.Path] = []
  for path in map(pathlib.Path, paths):
    if not path.exists():
      raise WeightsError(
        f"There is no file or folder {path}; give image files, or folders of them."
      )
    inside = image_files.files_in(path) if path.is_dir() else [path]
    if not inside:
      raise WeightsError(f"{path} holds no image ({', '.join(layout.IMAGE_SUFFIXES)}).")
    files.extend(inside)
  return files


def _row(prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
  if prediction.error:
    return {"image": prediction.image, "error": prediction.error}
  pairs = zip(prediction.labels, prediction.probabilities, strict=True)
  top = [{"class": classes[n], "label": n, "probability": round(p, 6)} for n, p in pairs]
  return {"image": prediction.image, "top": top}


def _write_csv(path: str, rows: Sequence[dict[str, Any]], top: int) -> None:
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    kinds = ("class", "label", "probability")
    names = [f"{kind}_{rank}" for rank in range(1, top + 1) for kind in kinds]
    writer.writerow(["image", *names, "error"])
    for row in rows:
      found = [entry[kind] for entry in row.get("top", ()) for kind in kinds]
      found += [""] * (len(names) - len(found))
      writer.writerow([row["image"], *found, row.get("error", "")])


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
  found = [row for row in rows if "top" in row]
  width = max([len(row["image"]) for row in found], default=0)
  for row in found:
    for rank, entry in enumerate(row["top"]):
      name = "" if rank else row["image"]
      share, number = 100 * entry["probability"], entry["label"]
      yield f"{name:{width}}  {share:6.2f} %  {entry['class']} ({number})"


def _draw(path: str, views: Sequence[np.ndarray], captions: Sequence[str], count: int) -> None:
  title = f"{len(views):,} of {counted(count, 'image')}"
  # The font of Pillow itself has Latin letters only.
  plain = [caption.encode("ascii", "replace").decode() for caption in captions]
  section = contact_sheet.Section(title, np.stack(views), plain, np.zeros(len(views), bool))
  contact_sheet.draw([section])[0].save(path)


def _check(options: argparse.Namespace) -> None:
  if options.top < 1:
    raise WeightsError(f"--top={options.top} must be 1 or more.")
  for name in ("csv", "sheet"):
    path = getattr(options, name)
    if path and not pathlib.Path(path).parent.is_dir():
      raise WeightsError(f"--{name}={path} cannot be written: there is no such folder.")
  if options.sheet and pathlib.Path(options.sheet).suffix != ".png":
    raise WeightsError(f"--sheet={options.sheet} must end in .png.")


def _config(program: str, options: argparse.Namespace, overrides: list[str]) -> Any:
  if not options.config:
    return None
  command_line.parse([program, f"--config={options.config}", *overrides], "--config=configs/X.py")
  config_lib.validate(command_line.FLAGS.config)
  return command_line.FLAGS.config


def _run(program: str, options: argparse.Namespace, overrides: list[str]) -> int:
  _check(options)
  files = find(options.images)
  config = _config(program, options, overrides)
  predictor = Predictor(options.weights, options.averages == "ema", config)
  if options.classes:
    names = about_lib.read_classes(options.classes)
    predictor.name_classes(names, f"--classes={options.classes}")
  top = min(options.top, predictor.num_classes)
  rows: list[dict[str, Any]] = []
  views, captions = list[np.ndarray](), list[str]()
  for prediction, view in predictor.predict(files, top):
    rows.append(_row(prediction, predictor.classes))
    if view is None:
      print(f"{prediction.image} is skipped: {prediction.error}.", file=sys.stderr)
    elif options.sheet and len(views) < _MOST_ON_SHEET:
      views.append(view)
      best = predictor.classes[prediction.labels[0]]
      captions.append(f"{100 * prediction.probabilities[0]:.0f} % {best}")
  skipped = sum("error" in row for row in rows)
  try:
    if options.csv:
      _write_csv(options.csv, rows, top)
    if options.sheet and views:
      _draw(options.sheet, views, captions, len(files) - skipped)
  except OSError as error:
    raise WeightsError(f"{error.filename} cannot be written ({error.strerror}).") from error
  if options.json:
    print(json.dumps(rows, indent=2, ensure_ascii=False))
  elif options.csv:
    print(f"{options.csv}: {counted(len(rows) - skipped, 'image')}, {skipped:,} skipped")
  else:
    for line in _table(rows):
      print(line)
  return SKIPPED if skipped else DONE


def main(argv: Sequence[str]) -> int:
  """Predict; return the exit code."""
  logging.set_verbosity(logging.ERROR)  # Orbax logs every read
  parser = _parser()
  options, rest = parser.parse_known_args(argv[1:])
  wrong = [word for word in rest if not (options.config and word.startswith("--config."))]
  if wrong:
    parser.error(f"unknown argument: {wrong[0]}")
  try:
    return _run(argv[0], options, rest)
  except (TrainerError, DataError) as error:
    print(error, file=sys.stderr)
    return FAILED


if __name__ == "__main__":
  sys.exit(main(sys.argv))
