"""python -m trainer --config=configs/X.py --workdir=DIR [--config.FIELD=VALUE ...] [--mode=eval]

--config   run file; configs/README.md lists them
--workdir  folder of everything the run writes, local or gs://; a run resumes from what is there
--mode     train (default), or eval: evaluate the newest checkpoint of the workdir
--trial    the run file made so small that a CPU runs all of it in a minute
--help     this text and every field of the config; --help=WORD only those about a word
"""

# ruff: noqa: E402 (a signal that comes during the slow imports must count too)

import faulthandler
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

import logging as python_logging
import os
from typing import Any

from absl import flags, logging

from input_pipeline.errors import DataError
from trainer import command_line
from trainer.errors import DONE, Preempted, TrainerError, exit_code

FLAGS = flags.FLAGS
flags.DEFINE_string(
  "workdir", None, "Folder of everything that the run writes; a run resumes from what it finds."
)
flags.DEFINE_enum(
  "mode", "train", ["train", "eval"], "train, or evaluate the newest checkpoint of the workdir."
)


class _OnlyOurs(python_logging.Filter):
  """Keeps the log to what a user can act on.

  Orbax and Grain log every save and read at INFO; of a failed save Orbax and gcsfs print the trace,
  and asyncio the tasks left behind, beside the trainer's own sentence; clu's work unit repeats the
  progress line.
  """

  def filter(self, record: python_logging.LogRecord) -> bool:
    libraries = ("orbax", "grain", "clu", "jax", "gcsfs", "fsspec")
    library = any(f"{os.sep}{name}{os.sep}" in record.pathname for name in libraries)
    if library:
      record.exc_info = None
    if library:
      return record.levelno >= python_logging.WARNING
    return "exception was never retrieved" not in record.getMessage()


def _only_ours(unraisable: Any) -> None:
  """The same for TensorStore's error in the event loop of a failed save, which Orbax has closed."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def main(argv: list[str]) -> int:
  """Run one mode; return the exit code of trainer.errors."""
  sys.unraisablehook = _only_ours
  logging.use_absl_handler()
  handler = logging.get_absl_handler()
  handler.addFilter(_OnlyOurs())
  handler.setFormatter(
    python_logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
  )
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold("info")
  try:
    word = command_line.help_wanted(argv)
    if word is not None:
      print(command_line.help_text(argv, str(__doc__).strip(), word))
      return DONE
    command_line.parse(argv, "--config=configs/X.py --workdir=DIR")
    # Imported here, so that a wrong flag is told in a moment, and before any device is touched.
    from trainer import train

    run = {"train": train.train, "eval": train.evaluate_only}[FLAGS.mode]
    run(FLAGS.config, FLAGS.workdir, stop)
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
