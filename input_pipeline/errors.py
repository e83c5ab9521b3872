"""The kinds of failure of data: some end a run, one costs a record."""


class DataError(Exception):
  """The data cannot be used; the text, one sentence, names the file or field and what to do."""

  def __str__(self) -> str:
    """Return the text in one line, whatever characters the names in it have."""
    return _printable(super().__str__())


class InputLost(DataError):
  """The data, or the processes that decode them, are not there now; a rerun may find them."""


class UnusableData(DataError):
  """The data as they are cannot be used; a rerun meets the same."""


class Stopped(Exception):
  """What was waited for is not needed any more: the process was asked to stop."""


class BadRecordError(Exception):
  """One record cannot be read or is no image; the text is the reason. Other records are usable."""


def one_line(text: str) -> str:
  """Return `text`, which may quote damaged bytes, fit for a log: printable, 300 characters."""
  return _printable(text[:300])


def _printable(text: str) -> str:
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
  """Return the first line of the text of an error; "" if it has none."""
  return (str(error).strip().splitlines() or [""])[0]
