import numpy as np
import pytest

from tests.trainer import tiny


@pytest.fixture
def config():
  config = tiny.get_config()
  config.data.kind = "synthetic"
  return config


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
    "label": rng.integers(0, 6, 8, np.int32),
  }
