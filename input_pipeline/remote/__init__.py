"""Files that are not on a local disk."""

import re


def has_scheme(path: str) -> bool:
  """Whether a path is SCHEME://..., as gs://BUCKET/FOLDER is, or was meant to be, as gs:/BUCKET."""
  return re.match(r"[A-Za-z][\w+.:-]*://|(gs|gcs|s3|https?|file|hf):", path) is not None
