"""What several tests of real runs need."""

import json
import socket


def fingerprints(workdir, step):
  """Returns the hash of every leaf at a step, as the checkpoint holds them."""
  return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())[
    "fingerprints"
  ]


def free_port():
  """Returns a port of this machine that nobody listens at."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
