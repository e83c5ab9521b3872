"""What is wrong with a file of weights."""

from trainer.errors import FAILED, TrainerError
from trainer.workdir import storage


class WeightsError(TrainerError):
  """A file of weights is damaged, refused, or does not fit the model; or its storage is silent."""

  def __init__(self, sentence: str, exit_code: int = FAILED):
    super().__init__(sentence)
    self.exit_code = exit_code


def unreadable(origin: str, error: Exception) -> WeightsError:
  """Return what ends a run whose weights a storage does not give; it may do so later."""
  ended = storage.failed(f"{origin} cannot be read", error)
  return WeightsError(str(ended), ended.exit_code)
