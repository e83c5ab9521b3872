"""The curves of one run or several, as the report draws them."""

from collections.abc import Sequence
import re
from typing import Any

import numpy as np

from trainer.reporting.recorded import Recorded

# Title, factor of the values, (scalar, legend) of each curve.
PANELS = (
  ("Loss", 1, (("train/loss", "train"), ("eval/loss", "eval"))),
  (
    "Accuracy, %",
    100,
    (
      ("train/top1", "train top-1"),
      ("eval/top1", "eval top-1"),
      ("eval/top5", "eval top-5"),
      ("train/agreement", "agreement with the teacher"),
    ),
  ),
  ("Learning rate", 1, (("train/learning_rate", ""),)),
  ("Size of training images, px", 1, (("train/image_size", ""),)),
  ("Gradient norm", 1, (("train/grad_norm", ""),)),
  ("Images per second", 1, (("train/images_per_second", ""),)),
  ("Model FLOPs utilisation, %", 100, (("train/mfu", ""),)),
  (
    "Time of a step, ms",
    1000,
    (("train/step_seconds_median", "median"), ("train/step_seconds_p99", "99th percentile")),
  ),
  ("Waiting for input, % of time", 100, (("train/input_wait", ""),)),
  ("Goodput, % of time since the first start", 100, (("train/goodput", ""),)),
)
_FROM_ZERO = ("Accuracy", "Learning", "Size", "Gradient", "Images", "Model", "Time", "Wait", "Good")
# So that a page stays below 2 MB: a point is about 25 bytes.
_ALL_POINTS, _MOST_POINTS, _LEAST_POINTS = 40_000, 1000, 40

Panel = dict[str, Any]


def loss_in_words(run: Recorded) -> str:
  """Return what the training loss has that the evaluation loss has not, "" if they are alike.

  The evaluation loss is the cross entropy of the labels, whatever config.loss is.
  """
  config = run.config or {}
  words = []
  if (loss := config.get("loss", "softmax_cross_entropy")) != "softmax_cross_entropy":
    words.append(str(loss))
  if smoothing := config.get("label_smoothing"):
    words.append(f"label smoothing {smoothing:g}")
  if operations := config.get("augment"):
    words.append(str(operations))
  if weight := config.get("distill", {}).get("weight"):
    words.append(f"a share of {weight:g} for the teacher")
  return ", ".join(words)


def panels(runs: Sequence[Recorded]) -> list[Panel]:
  """Return each panel of which a run has logged a curve, JSON-able.

  Returns:
    [{'title', 'note', 'zero': whether the axis begins at 0, 'curves': [{'run': number, 'label',
    'eval': whether it is of evaluations, 'x': steps, 't': seconds since the first start, 'y'}]}].
  """
  named = [
    (title, factor, chosen)
    for title, factor, names in _split_losses(runs)
    if (chosen := _chosen(title, names, runs))
  ]
  number = sum(len(chosen) for _, _, chosen in named)
  most = int(np.clip(_ALL_POINTS // max(1, number), _LEAST_POINTS, _MOST_POINTS))
  return [
    {
      "title": title,
      "note": _note(title, runs),
      "zero": title.startswith(_FROM_ZERO),
      "curves": [_curve(run, runs[run], name, label, factor, most) for run, name, label in chosen],
    }
    for title, factor, chosen in named
  ]


def _chosen(
  title: str, names: Sequence[tuple[str, str]], runs: Sequence[Recorded]
) -> list[tuple[int, str, str]]:
  """Return number of the run, scalar and legend of each curve of a panel."""
  return [
    (number, name, label)
    for number, run in enumerate(runs)
    for name, label in _with_splits(title, names, run)
    if name in run.scalars
  ]


def _split_losses(runs: Sequence[Recorded]) -> list[tuple[str, float, tuple[Any, ...]]]:
  """Return the panels; losses that are defined differently have one each."""
  if not any(map(loss_in_words, runs)):
    return list(PANELS)
  (_, factor, (train, evaluation)), *rest = PANELS
  apart = (("Training loss", factor, (train,)), ("Evaluation loss", factor, (evaluation,)))
  return [*apart, *rest]


def _note(title: str, runs: Sequence[Recorded]) -> str:
  words = sorted({word for run in runs if (word := loss_in_words(run))})
  if title == "Training loss":
    return f"with {'; '.join(words)}"
  if title == "Evaluation loss":
    return "cross entropy of the labels alone"
  if title.startswith("Accuracy") and any((run.config or {}).get("augment") for run in runs):
    return "in training, of mixed or augmented images"
  return ""


def _with_splits(
  title: str, names: Sequence[tuple[str, str]], run: Recorded
) -> list[tuple[str, str]]:
  """Return scalars and legends, with those of further splits and of raw weights."""
  if not title.startswith("Accuracy"):
    return list(names)
  more = [("eval/raw_top1", "not averaged top-1"), ("eval/real_top1", "ReaL")]
  splits = sorted(name for name in run.scalars if re.fullmatch(r"eval/.+/top1", name))
  return [*names, *more, *((name, f"{name[5:-5]} top-1") for name in splits)]


def _curve(
  number: int, run: Recorded, name: str, label: str, factor: float, most: int
) -> dict[str, Any]:
  steps, values, times = run.scalars[name]
  first = (run.starts or {}).get("first_start") or min(t[0] for _, _, t in run.scalars.values())
  kept = _thinned(values, most)
  return {
    "run": number,
    "label": label,
    "eval": name.startswith("eval/"),
    "x": steps[kept].tolist(),
    "t": np.maximum(0, times[kept] - first).round().astype(int).tolist(),
    "y": [float(f"{v:.5g}") if np.isfinite(v) else None for v in factor * values[kept]],
  }


def _thinned(values: np.ndarray, most: int) -> np.ndarray:
  """Return the indices of at most so many values: the lowest and highest of each stretch."""
  if len(values) <= most:
    return np.arange(len(values))
  kept = {0, len(values) - 1}
  for part in np.array_split(np.arange(len(values)), most // 2 - 1):
    finite = np.nan_to_num(values[part])
    kept |= {int(part[finite.argmin()]), int(part[finite.argmax()])}
  return np.array(sorted(kept))
