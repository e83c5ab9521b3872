"""What ends a run, and the exit codes that a launcher reads."""

DONE = 0
FAILED = 2  # a rerun of the same command fails in the same way
PREEMPTED = 75  # stopped on request after saving; the same command goes on from there
HOST_LOST = (
  76  # another host, or the storage, is missing or silent; the same command on all hosts goes on
)


class TrainerError(Exception):
  """Ends the run with one sentence for the user and `exit_code`."""

  exit_code = FAILED


class ConfigError(TrainerError):
  """A config field is unknown, of the wrong type, out of range, or does not fit the data or the workdir."""


class CheckpointError(TrainerError):
  """A checkpoint is needed and none can be read or written."""


class StorageError(CheckpointError):
  """The storage of the checkpoints does not answer as it should now; the same command may find it well."""

  exit_code = HOST_LOST


class NonFiniteError(TrainerError):
  """Loss, gradients or parameters stopped being finite numbers."""


class HostLost(TrainerError):
  """A host did not come up, or was not heard for too long."""

  exit_code = HOST_LOST


class Preempted(TrainerError):
  """SIGTERM or Ctrl-C came; everything there is to keep is on disk."""

  exit_code = PREEMPTED
