"""Errors that end a run, and the exit codes that a launcher reads."""

DONE = 0
FAILED = 2  # the same command fails in the same way
PREEMPTED = 75  # stopped on request after saving; the same command resumes the run
# Another host, or the storage, is missing or silent, or the workdir is in use; the same command on
# all hosts resumes the run.
HOST_LOST = 76


class TrainerError(Exception):
  """Ends the run with one sentence for the user and `exit_code`."""

  exit_code = FAILED


class ConfigError(TrainerError):
  """A config field is unknown, of the wrong type, out of range, or unfit for data or workdir."""


class CheckpointError(TrainerError):
  """A checkpoint is needed and none can be read or written."""


class StorageError(CheckpointError):
  """The storage of the checkpoints cannot be reached now; the same command may succeed later."""

  exit_code = HOST_LOST


class WorkdirBusy(TrainerError):
  """Another run writes to the workdir; the same command may succeed once that has ended."""

  exit_code = HOST_LOST


class NonFiniteError(TrainerError):
  """Loss, gradients or parameters are not finite numbers any more."""


class HostLost(TrainerError):
  """A host did not come up in time, or was silent for too long."""

  exit_code = HOST_LOST


class Preempted(TrainerError):
  """Stopped by SIGTERM or Ctrl-C; everything worth keeping is saved."""

  exit_code = PREEMPTED
