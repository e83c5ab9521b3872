"""A step of launch.preflight: traced, then compiled, or refused in one sentence."""

from collections.abc import Iterator, Mapping
import contextlib
import re
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from launch.cloud.preflight import DOES_NOT_FIT
from trainer.errors import ConfigError, TrainerError

if TYPE_CHECKING:
  import jax

  from trainer import program as program_lib

_PROGRESS_SECONDS = 10.0


class DoesNotFitError(TrainerError):
  """A step needs more memory than a chip has.

  Attributes:
    mode: of the step, "train" or "eval".
  """

  exit_code = DOES_NOT_FIT

  def __init__(self, message: str, mode: str = "train"):
    super().__init__(message)
    self.mode = mode


def name_of(mode: str, sizes: Mapping[str, int]) -> str:
  """Returns what a step is called on the screen."""
  return f"{mode} step, {sizes['batch_size']} images of {sizes['image_size']} px"


def lower(
  program: "program_lib.Program", mode: Any, sizes: Mapping[str, int], screen: TextIO
) -> "jax.stages.Lowered":
  """Returns a traced step, whose operations have the names of their layers."""
  from trainer.tools import layers

  model = layers.structure(program.model, program.abstract_state.raw())
  with _progress(f"{name_of(mode, sizes)}: tracing", screen), layers.named(model):
    return program.lower(mode, **sizes)


def compile_step(
  program: "program_lib.Program",
  lowered: "jax.stages.Lowered",
  mode: Any,
  sizes: Mapping[str, int],
  screen: TextIO,
) -> tuple["jax.stages.Compiled", float]:
  """Returns a compiled step and the CPU-seconds that it took.

  Raises:
    DoesNotFitError: by how much.
    ConfigError: if the compiler refuses it for another reason.
  """
  import jax

  what = name_of(mode, sizes)
  # Of the processor: what else runs beside it would be in those of the clock.
  start = time.process_time()
  try:
    with _progress(f"{what}: compiling", screen):
      return program.finish(lowered, mode), time.process_time() - start
  except jax.errors.JaxRuntimeError as error:
    if over := _too_large(str(error)):
      raise DoesNotFitError(f"The {what} do not fit: {over}.", mode) from error
    raise ConfigError(f"The compiler refuses the {what}: {first_line(error)}") from error


def _too_large(message: str) -> str:
  """Returns by how much a program exceeds the memory; "" if a message is of something else."""
  size = r"\(?([\d.]+)([KMGT])\)?"
  found = re.search(rf"HLO temporaries {size} exceeds available HBM {size}", message) or re.search(
    rf"Used {size} of {size} hbm", message
  )
  if not found:
    return "the chip's memory is too small" if "RESOURCE_EXHAUSTED" in message else ""
  needed, there = (float(found[i]) * 2.0 ** (10 * "_KMGT".index(found[i + 1]) - 30) for i in (1, 3))
  return (
    f"they need {needed:.2f} GiB of the {there:.2f} of a chip's memory, "
    f"{needed - there:.2f} too much"
  )


@contextlib.contextmanager
def _progress(what: str, screen: TextIO) -> Iterator[None]:
  """Write a line now and then while the body runs."""
  start, done = time.perf_counter(), threading.Event()

  def watch() -> None:
    while not done.wait(_PROGRESS_SECONDS):
      print(f"{what} for {time.perf_counter() - start:.0f} s", file=screen, flush=True)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
  print(f"{what}: {time.perf_counter() - start:.0f} s", file=screen, flush=True)


def first_line(error: Exception) -> str:
  """Returns the message of an XLA error, without its code and its trace."""
  line = str(error).strip().splitlines()[0]
  return re.sub(r"^[A-Z_]+: ", "", line).rstrip(".") + "."
