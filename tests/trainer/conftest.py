import signal

import numpy as np
import pytest

from tests.trainer import bucket_server, tiny
from tests.trainer.shared import ENVIRONMENT


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """A bucket on loopback, for this process and those that it starts."""
  with (
    bucket_server.serving(tmp_path_factory.mktemp("server")) as server,
    pytest.MonkeyPatch.context() as patch,
  ):
    # Of this process too, and for TensorStore before it is first used.
    for name, value in server.environment.items():
      patch.setenv(name, value)
      patch.setitem(ENVIRONMENT, name, value)
    yield server


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


@pytest.fixture
def python_interrupts():
  """Python's own handler of SIGINT, which a process in the background may lack."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
