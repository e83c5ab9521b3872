"""Train a model, or evaluate one.

    python -m trainer --config=imagenet_resnet50 --workdir=runs/r50 --config.data.path=data/imagenet
    python -m trainer --mode=eval --workdir=runs/r50

The first trains, or resumes what the workdir holds; the second evaluates it.

--config=X           run file: a path, or the name of one that comes with the program
--config.FIELD=VALUE sets a field, as in --config.model.depth=18
--workdir=DIR        folder of everything the run writes, local or gs://
--mode=train|eval    train (default), or evaluate a checkpoint of the workdir
--checkpoint=C       which one: newest (default), best, or a step
--verbose            print every parameter and how it is split over the devices
--trial              the run file made so small that a CPU runs all of it in a minute
"""

# ruff: noqa: E402 (a signal that comes during the slow imports must count too)

import faulthandler
import gc
import signal
import sys

if sys.platform == "win32":
  sys.exit("trainer: Windows is not supported; use Linux, for example in WSL 2.")

from trainer import streams
from trainer.pod.preemption import StopRequest

stop = StopRequest()
if __name__ == "__main__":
  streams.protect()
  stop.install()
  # Writes where every thread is, also when all of them wait in C++.
  faulthandler.register(signal.SIGUSR1)
  gc.disable()  # there is no garbage among imports; looking for it takes a fifth of their time

import os
from typing import Any

from absl import flags, logging

from configs import recipes
from input_pipeline.errors import DataError
from input_pipeline.sources import local
from trainer import command_line
from trainer.errors import DONE, Preempted, TrainerError, exit_code
from trainer.reporting import screen

FLAGS = flags.FLAGS
flags.DEFINE_string(
  "workdir", None, "Folder of everything that the run writes; a run resumes from what it finds."
)
flags.DEFINE_enum(
  "mode", "train", ["train", "eval"], "train, or evaluate a checkpoint of the workdir."
)
flags.DEFINE_string("checkpoint", "newest", "What --mode=eval evaluates: newest, best, or a step.")
flags.DEFINE_bool("verbose", False, "Print every parameter and how it is split over the devices.")


def _show_unraisable(unraisable: Any) -> None:
  """Show an exception that nobody can catch, but for one of a failed save, which is told elsewhere.

  That is TensorStore's, in an event loop that Orbax has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _check_place(path: str, workdir: str) -> None:
  """Raise TrainerError if a new run would write among the images: its folders would be classes."""
  data, place = (os.path.realpath(os.path.expanduser(p)) for p in (path, workdir))
  inside = place == data or place.startswith(f"{data}{os.sep}")
  if not path or "://" in path + workdir or not inside or os.path.exists(f"{place}/config.json"):
    return
  if os.path.isdir(data) and local.guess_kind(data) == "folder":
    raise TrainerError(f"--workdir={workdir} is in the folder of the images, {path}; give another.")


def main(argv: list[str]) -> int:
  """Run one mode; return the exit code of trainer.errors."""
  sys.unraisablehook = _show_unraisable
  screen.log_to_screen()
  stop.waits_for = lambda: screen.SCREEN.waits_for
  try:
    if command_line.answered(argv, __doc__):
      return DONE
    evaluation = any(a.lstrip("-") == "mode=eval" for a in recipes.joined(argv)[1:])
    command_line.parse(argv, "--config=configs/X.py --workdir=DIR", by_workdir=evaluation)
    if FLAGS.mode == "train" and FLAGS["checkpoint"].present:
      raise TrainerError(
        f"--checkpoint={FLAGS.checkpoint} is of --mode=eval. Training resumes the newest "
        "checkpoint of --workdir; --config.init_from=DIR begins another run with its weights."
      )
    _check_place(FLAGS.config.data.path, FLAGS.workdir)
    # Imported here, so that a wrong flag is told in a moment, and before any device is touched.
    from trainer import train

    gc.enable()
    if FLAGS.mode == "eval":
      train.evaluate_only(FLAGS.config, FLAGS.workdir, stop, FLAGS.checkpoint)
    else:
      train.train(FLAGS.config, FLAGS.workdir, stop, FLAGS.verbose)
  except Preempted as error:
    logging.info("%s", error)
    return error.exit_code
  except TrainerError as error:
    logging.error("%s", error)
    return error.exit_code
  except DataError as error:
    logging.error("%s", error)
    return exit_code(error)
  return DONE


if __name__ == "__main__":
  code = main(sys.argv)
  logging.flush()
  sys.stdout.flush()
  sys.stderr.flush()
  # Everything is closed by now. What may be left are threads of a save that failed, which would
  # hold up the end of the interpreter and fill the screen with their traces.
  os._exit(code)
