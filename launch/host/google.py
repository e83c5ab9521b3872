"""What a host asks Google: its metadata server, and gcloud as its service account."""

from __future__ import annotations

import os
import subprocess
import urllib.request


def metadata(path: str) -> str | None:
  """Return a value of the machine's metadata server, or None where there is none."""
  server = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as reply:
      return reply.read().decode()
  except (OSError, ValueError):
    return None


def gcloud(*words: str, seconds: float = 120.0) -> str:
  """Run gcloud and return its output; RuntimeError with its last line if it fails."""
  name = f"gcloud {' '.join(words[:4])}"
  try:
    done = subprocess.run(
      ["gcloud", *words, "--quiet"],
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=seconds,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise RuntimeError(f"{name}: {error}") from error
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise RuntimeError(f"{name}: {lines[-1][:300]}")
  return done.stdout
