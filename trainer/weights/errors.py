"""What is wrong with a file of weights."""

from trainer.errors import FAILED, HOST_LOST, TrainerError
from trainer.workdir import storage


class WeightsError(TrainerError):
  """A file of weights is damaged, refused, or does not fit the model; or its storage is silent."""

  def __init__(self, sentence: str, exit_code: int = FAILED):
    super().__init__(sentence)
    self.exit_code = exit_code


def unreadable(origin: str, error: Exception) -> WeightsError:
  """Return what ends a run whose weights a storage does not give; it may do so later."""
  passes = storage.may_pass(error)
  advice = "run the same command again" if passes else "mend that, then run the same command again"
  return WeightsError(
    f"{origin} cannot be read ({storage.first_line(error)}); {advice}.",
    HOST_LOST if passes else FAILED,
  )
