"""What goes wrong with data, in two kinds: what stops a run, and what costs one record."""


class DataError(Exception):
  """The data cannot be used; the text, one sentence, names the file or field and what to do."""


class BadRecordError(Exception):
  """One record cannot be read or is no image; the text says why. The rest of the data is usable."""


def one_line(text: str) -> str:
  """Returns `text` fit for a log, for it may quote damaged bytes: printable, not too long."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:300])
