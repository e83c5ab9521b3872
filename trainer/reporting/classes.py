"""What an evaluation gives for each class, and which classes are taken for each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_PAIRS = 100  # most frequent confusions that are listed


def table(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
  """Return the accuracy of each class, and the most frequent confusions, JSON-able.

  Args:
    confusion: int [classes, classes]: examples by label and by the class with the highest logit.
    names: of the classes, by label.

  Returns:
    'mean_class_top1': mean accuracy over the classes that have examples; 'classes': [{'class',
    'label', 'examples', 'top1'}] of these, by label; 'confusions': [{'class', 'taken_for',
    'examples', 'share'}], most examples first, with their share of the class.
  """
  examples, right = confusion.sum(1), np.diagonal(confusion)
  present = np.flatnonzero(examples)
  classes = [
    {
      "class": names[label],
      "label": label,
      "examples": int(examples[label]),
      "top1": float(right[label] / examples[label]),
    }
    for label in map(int, present)
  ]
  wrong = confusion - np.diag(right)
  order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
  pairs = [divmod(int(i), len(wrong)) for i in order if wrong.flat[i]]
  return {
    "mean_class_top1": float(np.mean(right[present] / examples[present])),
    "classes": classes,
    "confusions": [
      {
        "class": names[label],
        "taken_for": names[other],
        "examples": int(wrong[label, other]),
        "share": float(wrong[label, other] / examples[label]),
      }
      for label, other in pairs
    ],
  }
