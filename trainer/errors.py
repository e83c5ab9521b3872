"""Errors that end a run, and the exit codes that a launcher reads."""

from input_pipeline.errors import DataError, InputLost

DONE = 0
FAILED = 2  # the same command fails in the same way
PREEMPTED = 75  # stopped on request after saving; the same command resumes the run
# Another host, the storage or the input is missing or silent, the workdir is in use, devices
# disagree, or something failed for the first time; the same command on all hosts resumes the run.
HOST_LOST = 76


class TrainerError(Exception):
  """Ends the run with one sentence for the user and `exit_code`.

  Attributes:
    agreed: whether all hosts raise it together, so that none is to be notified.
  """

  exit_code = FAILED
  agreed = False


class ConfigError(TrainerError):
  """A config field is unknown, of the wrong type, out of range, or unfit for data or workdir."""


class CheckpointError(TrainerError):
  """A checkpoint is needed and none can be read or written."""


class StorageError(CheckpointError):
  """The storage of a workdir cannot be read or written.

  Where it is silent or busy the same command may succeed later. Where it refuses, for want of a
  bucket, a right or room, it is `lasting`.
  """

  def __init__(self, sentence: str, lasting: bool = False):
    super().__init__(sentence)
    self.exit_code = FAILED if lasting else HOST_LOST


class WorkdirBusy(TrainerError):
  """Another run writes to the workdir; the same command may succeed once that has ended."""

  exit_code = HOST_LOST


class NoDevices(TrainerError):
  """JAX cannot use the devices that it is asked for: they, or what drives them, are not there."""

  exit_code = 1  # others may hold the chips for a while: a launcher tries again, not without end


class NonFiniteError(TrainerError):
  """Loss, gradients or parameters are not finite numbers any more."""


class ReplicasDiffer(TrainerError):
  """Copies of the same array are not equal, or devices get other results from the same work."""

  exit_code = HOST_LOST


class HostLost(TrainerError):
  """A host did not come up in time, or was silent for too long."""

  exit_code = HOST_LOST


class Preempted(TrainerError):
  """Stopped by SIGTERM or Ctrl-C; everything worth keeping is saved."""

  exit_code = PREEMPTED
  agreed = True


class RunFailed(TrainerError):
  """The input, a host's memory or a library failed; the last good state is saved where possible."""

  def __init__(self, sentence: str, exit_code: int, agreed: bool = True):
    super().__init__(sentence)
    self.exit_code, self.agreed = exit_code, agreed


def exit_code(error: BaseException) -> int:
  """Return the exit code of the process that an error ends."""
  if isinstance(error, TrainerError):
    return error.exit_code
  if isinstance(error, DataError):
    return HOST_LOST if isinstance(error, InputLost) else FAILED
  return 1  # as Python does
