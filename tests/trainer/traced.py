"""Runs the trainer, and notes the rows that each host was fed and the exact loss of each step.

    python -m tests.trainer.traced FOLDER --config=... --workdir=...

Writes FOLDER/rows-HOST.json, a list of steps of hashes of (image, label), and on host 0
FOLDER/losses.json.
"""

import hashlib
import json
import pathlib
import sys

import jax

from input_pipeline import loader
from trainer import __main__
from trainer.reporting import telemetry
from trainer.step import METRICS


def main(folder: str, *flags: str) -> int:
  rows, losses = [], []
  batches, step = loader.train_batches, telemetry.Telemetry.step

  class Traced:
    def __init__(self, *args, **kwargs):
      self._batches = batches(*args, **kwargs)

    def __iter__(self):
      return self

    def __next__(self):
      batch = next(self._batches)
      rows.append(
        [
          hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()
          for image, label in zip(batch["image"], batch["label"], strict=True)
        ]
      )
      return batch

    def __getattr__(self, name):
      return getattr(self._batches, name)

  def traced_step(self, number, metrics):
    losses.append(float(jax.device_get(metrics)[METRICS.index("loss")]))
    step(self, number, metrics)

  loader.train_batches, telemetry.Telemetry.step = Traced, traced_step
  code = __main__.main(["trainer", *flags])
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  (path / f"rows-{jax.process_index()}.json").write_text(json.dumps(rows[: len(losses)]))
  if jax.process_index() == 0:
    (path / "losses.json").write_text(json.dumps(losses))
  return code


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
