"""Files that are not on a local disk."""

import re


def has_scheme(path: str) -> bool:
  """Whether a path is SCHEME://..., as gs://BUCKET/FOLDER is."""
  return re.match(r"[A-Za-z][\w+.:-]*://", path) is not None
