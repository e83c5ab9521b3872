"""The three ways in, side by side: what prepare, direct training and inspect make of data.

An image has the colour of its class, so a wrong label shows.
"""

import collections
import contextlib
import io
import json

import numpy as np
from PIL import Image

from input_pipeline import image, loader, sources
from input_pipeline.errors import DataError
from input_pipeline.tools import inspect
from tests.input_pipeline.conftest import data_config, run_prepare

COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200), "fox": (30, 200, 30)}


def picture(name, kind="JPEG"):
  """Return the file of a small image in the colour of a class."""
  file = io.BytesIO()
  Image.new("RGB", (12, 10), COLOURS[name]).save(file, kind)
  return file.getvalue()


def colour_of(pixels):
  """Return the class whose colour an image has, or a grey word if it has none."""
  mean = np.asarray(pixels, float).reshape(-1, 3).mean(0)
  near = {name: abs(mean - colour).max() for name, colour in COLOURS.items()}
  best = min(near, key=near.get)
  return best if near[best] < 40 else "no colour"


def by_prepare(out, *flags):
  """Return {split: {(class, colour): images}} of the shards that prepare makes, or its sentence."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    code = run_prepare("--out", out, *flags)
  lines = said.getvalue().strip().splitlines()
  if code:
    assert code == 1 and lines[-1].startswith("prepare: "), lines
    return lines[-1].removeprefix("prepare: ")
  manifest = json.loads((out / "manifest.json").read_text())
  found = {}
  for split in manifest["splits"]:
    source = sources.open_source(data_config(out), split, None)
    records = [source[i] for i in range(len(source))]
    found[split] = dict(
      collections.Counter(
        (source.class_names[r.label], colour_of(image.decode(r.image))) for r in records
      )
    )
  return found


def by_training(path, split, num_classes=None, **fields):
  """Return {(class, colour): images} of a pass over a split, or the sentence that refuses it."""
  data = data_config(path, threads=0, max_bad_fraction=0.5, **fields)
  try:
    source = sources.open_source(data, split, num_classes)
    found = collections.Counter()
    with contextlib.closing(loader.eval_batches(source, data, batch_size=4)) as batches:
      for batch in batches:
        for pixels, label in zip(batch["image"][batch["mask"]], batch["label"][batch["mask"]]):
          found[source.class_names[label], colour_of(pixels)] += 1
    train = loader.train_batches(source, data, seed=0, global_batch_size=2)
    with contextlib.closing(train):
      next(train)
    return dict(found)
  except DataError as e:
    return str(e)


def by_inspect(path, split, **fields):
  """Return the counts that inspect prints of a split, {class: images}, or its sentence."""
  said, errors = io.StringIO(), io.StringIO()
  flags = [f"--config.data.{name}={value}" for name, value in fields.items()]
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
    code = inspect.main(["inspect", f"--data={path}", f"--split={split}", "--sheet=", *flags])
  if code:
    return errors.getvalue().strip().splitlines()[-1].removeprefix("inspect: ")
  lines = said.getvalue().splitlines()
  (counts,) = [line for line in lines if line.startswith(" " * 13) and "): " in line]
  pairs = (part.rsplit(" (", 1) for part in counts.strip().split(", "))
  return {name: int(rest.partition("): ")[2]) for name, rest in pairs}


def right(**counts):
  """Return what a way in returns if every class has its colour: {(class, class): images}."""
  return {(name, name): count for name, count in counts.items()}


def all_ways(out, path, flags, wanted, names=None, num_classes=None, **fields):
  """Assert that every way in gives the same right answer.

  Args:
    out: folder for the shards.
    path: of the data, as config.data.path.
    flags: of prepare.
    wanted: {split: {class: images}}, or words of the sentence that refuses them.
    names: the splits as prepare calls them, where these are others.
    num_classes: of the model.
    fields: of config.data.
  """
  made = by_prepare(out, *flags)
  if isinstance(wanted, str):
    answers = [made] + [by_training(path, s, num_classes, **fields) for s in ("train", "val")]
    answers += [by_inspect(path, s, **fields) for s in ("train", "val")]
    for answer in answers:
      assert isinstance(answer, str) and wanted in answer and "\n" not in answer, answer
    assert not (out / "manifest.json").exists()
    return
  assert made == {(names or {}).get(s, s): right(**counts) for s, counts in wanted.items()}
  for split, counts in wanted.items():
    assert by_training(path, split, num_classes, **fields) == right(**counts)
    assert by_inspect(path, split, **fields) == counts
