"""All tests and the processes that they start share compiled programs."""

import os
import subprocess
import sys
import tempfile

from absl import logging
import numpy as np
import pytest
import simplejpeg

from tests import quickly

# In the environment, because child processes must see it, and before anything imports jax. Workers
# of xdist inherit it.
_cache = None
if "PYTEST_XDIST_WORKER" not in os.environ:
  _cache = tempfile.TemporaryDirectory(prefix="compiled-")
  os.environ.update(
    {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": _cache.name,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "XLA_FLAGS": quickly.XLA_FLAGS,
    }
  )


def pytest_unconfigure(config):
  del config
  if _cache:
    _cache.cleanup()


# The files that take longest, which come first, so that no process is left alone with one of them.
_LONG = (
  *("run", "sharding", "pod", "lives", "chaos", "bucket", "topologies", "recipes", "failures"),
  *("step", "faults", "replicas", "variants"),
)


def pytest_collection_modifyitems(items):
  places = {f"test_{name}": place for place, name in enumerate(_LONG)}
  items.sort(key=lambda item: places.get(item.path.stem, len(places)))


_VERBOSITY = logging.get_verbosity()
_LEVEL = logging.get_absl_logger().level  # none of its own


@pytest.fixture(autouse=True)
def verbosity():
  """Each test logs as much as the first one, whatever commands in this process have set."""
  logging.set_verbosity(_VERBOSITY)
  logging.get_absl_logger().setLevel(_LEVEL)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
  """A folder of shards: 6 classes, each a hue with noise; 72 and 29 images of 20 to 28 px."""
  folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
  rng = np.random.default_rng(0)
  for split, count in (("train", 72), ("val", 29)):
    for i in range(count):
      label = i % 6
      height, width = rng.integers(20, 28, 2)
      noise = rng.integers(0, 128, (height, width, 3))
      pixels = (noise + 127 * np.array([label & 1, label >> 1 & 1, label >> 2])).astype(np.uint8)
      path = folder / split / f"class{label}" / f"{i}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(simplejpeg.encode_jpeg(pixels))
  subprocess.run(
    [
      sys.executable,
      "-m",
      "input_pipeline.prepare",
      "--folder",
      folder,
      "--out",
      out,
      "--shards",
      "3",
      "--val-shards",
      "2",
      "--workers",
      "1",
    ],
    check=True,
    capture_output=True,
  )
  return out
