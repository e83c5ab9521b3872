"""What goes wrong with data, in two kinds: what stops a run, and what costs one record."""


class DataError(Exception):
  """The data cannot be used; the text, one sentence, names the file or field and what to do."""


class BadRecordError(Exception):
  """One record cannot be read or is no image; the text says why. The rest of the data is usable."""
