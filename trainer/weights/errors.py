"""What is wrong with a file of weights."""

from trainer.errors import TrainerError


class WeightsError(TrainerError):
  """A file of weights is damaged, refused, or does not fit the model."""
