"""Inspect data before a run: what they are, whether they are intact, what the model will get.

    python -m input_pipeline.inspect --data=DIR_OR_URL [--config=configs/X.py]
        [--config.data.field=value ...]

It writes one picture of training images and evaluation crops with their labels, made by the loader
with the crops, flips and operations of the config (the rest, such as mixup, happens on devices).
If there are operations, some images follow in eight views each, with the steps that each has had.
For each split it prints the numbers of records, classes and bytes, formats and sizes of a sample,
and checks that the data are what was written: by the SHA-256 of every shard if there is a manifest,
else by reading every record, whose hash ArrayRecord checks.

Exit code: 0 the data are good; 1 they are not, with a sentence per problem; 2 the command line is
wrong.
"""

import collections
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import os
import sys
import textwrap
from typing import Any

from absl import flags, logging
from ml_collections import config_flags
import numpy as np

from configs import base, checks, recipes, run_file
from configs.names import counted
from input_pipeline import records, sources
from input_pipeline.errors import BadRecordError, DataError, one_line
from input_pipeline.prepare import shards as shards_lib
from input_pipeline.prepare.progress import Progress
from input_pipeline.sources import Source, layout, parquet_files, slices
from input_pipeline.tools import checksums, contact_sheet

_CHUNK = 256  # neighbouring records that one thread reads in a row
_VIEWED = 6  # images that are shown in several views
_WIDTH = 100  # of a line
_HARD = "\xa0"  # a blank that is no place to break a line
_SHOWN = 10  # bad records and classes that are named
_MAGIC = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"GI": "GIF", b"BM": "BMP", b"RI": "WebP"}


class UsageError(Exception):
  """The command line is wrong; the text is one sentence."""


def main(argv: Sequence[str]) -> int:
  """Run the command; return its exit code."""
  try:
    options = _parse(argv)
  except UsageError as e:
    print(f"inspect: {e}", file=sys.stderr)
    return 2
  if options.help:
    print(f"{__doc__}\n{_help(options)}")
    return 0
  logging.set_verbosity(logging.ERROR)  # bad records are counted and named here
  try:
    wrong = inspect(options)
  except DataError as e:
    wrong = [str(e)]
  except KeyboardInterrupt:
    print("inspect: interrupted.", file=sys.stderr)
    return 130
  for sentence in wrong:
    print(f"inspect: {sentence}", file=sys.stderr)
  return 1 if wrong else 0


def _help(options: flags.FlagValues) -> str:
  """Return a line for each flag of this command, and not those that absl has for all."""
  words = {"config": "FILE", "data": "DIR", "split": "NAME", "sheet": "FILE", "list": "FILE"}
  lines = []
  for flag in options.flags_by_module_dict()[__name__]:
    value = {bool: "", int: "=N"}.get(type(flag.default), f"={words.get(flag.name, '')}")
    text = f"{flag.help}{f' Default {flag.default}.' if flag.default else ''}"
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}{value}"
    lines.append(f"{name:14} {text}")
  return "\n".join(lines)


def _parse(argv: Sequence[str]) -> flags.FlagValues:
  """Return the flags of a command line; raise UsageError if it is wrong."""
  options = flags.FlagValues()  # of its own, as the trainer has a --config too
  text, whole, switch = (
    functools.partial(define, flag_values=options)
    for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean)
  )
  text("data", "", "Folder or URL; same as --config.data.path.")
  text("split", "", "A split; both of the config if empty.")
  switch("check", True, "Check every byte.")
  whole("sample", 2000, "Records to decode of each split; 0 is all.")
  text("sheet", "contact_sheet.png", "File of the picture; empty for none.")
  whole("images", 32, "Images of each split in the picture.")
  text("list", "", "File for the list of all files that are left out, as JSON.")
  switch("help", False, "Show this text.")
  try:
    argv = recipes.with_paths(["--help" if a in ("-h", "--helpfull") else a for a in argv])
  except ValueError as e:
    raise UsageError(str(e)) from e
  help_text = "Run file (default configs/base.py); --config.field=value sets a single field."
  config_flags.DEFINE_config_file("config", None, help_text, flag_values=options, sys_argv=argv)
  if not any(argument.split("=")[0] == "--config" for argument in argv):
    argv.insert(1, f"--config={base.__file__}")
  try:
    rest = options(argv)
    options.config.to_dict()  # a file that cannot be loaded fails at its first use
  except run_file.RAISED as e:
    raise UsageError(run_file.trouble(e, argv, options["config"])) from e
  try:
    checks.check(options.config)
  except (AttributeError, ValueError) as e:
    raise UsageError(str(e)) from e
  if len(rest) > 1:
    raise UsageError(f"{rest[1]!r} is not a flag; did you mean --data={rest[1]}?")
  for name, least in (("sample", 0), ("images", 1)):
    value = options[name].value
    if value is None or value < least:
      raise UsageError(f"--{name}={value} must be at least {least}.")
  if options.sheet:
    if not options.sheet.endswith(".png"):
      raise UsageError(f"--sheet={options.sheet} must end in .png.")
    if not os.path.isdir(os.path.dirname(options.sheet) or "."):
      raise UsageError(f"--sheet={options.sheet} is in a folder that does not exist.")
  if options.data:
    options.config.data.path = options.data
  data = options.config.data
  if not data.path and data.kind != "synthetic" and not options.help:
    raise UsageError("--data=DIR_OR_URL is needed.")
  return options


def inspect(options: flags.FlagValues) -> list[str]:
  """Do the work of the command; return one sentence for each problem.

  Raises:
    DataError: the data cannot be opened.
  """
  data = options.config.data
  if not sources.source_class(data.kind, data.path).indexed and not parquet_files.is_folder(
    data.path
  ):
    raise DataError(
      f"{data.path} has neither checksums nor access by index; make shards of it with "
      "`python -m input_pipeline.prepare --from` and inspect those."
    )
  # Without a run file the base config is used for the loader only, not for its model.
  num_classes = options.config.model.num_classes or None
  if _run_file(options) == base.__file__ and data.kind != "synthetic":
    num_classes = None
  splits = [options.split] if options.split else [data.train_split]
  if not options.split:
    splits += slices.several(data.eval_split, "config.data.eval_split")
  opened = {split: sources.open_source(data, split, num_classes) for split in splits}
  for line in layout.summary(opened.values()):
    print(line, flush=True)
  if options.list:
    _write_list(options.list, opened.values())
  wrong = _write_sheet(options, opened) if options.sheet else []
  for split, source in opened.items():
    wrong += _inspect_split(options, split, source)
  # A shard that cannot be opened is reported more than once.
  return list(dict.fromkeys(wrong))


def _write_list(path: str, opened: Iterable[Source]) -> None:
  left_out = {
    reason: sorted(paths) for source in opened for reason, paths in source.left_out.items()
  }
  try:
    with open(path, "wb") as f:
      f.write(records.to_json(left_out))
  except OSError as e:
    raise DataError(f"--list={path} cannot be written ({e.strerror}).") from e


def _run_file(options: flags.FlagValues) -> str:
  flag: Any = options["config"]  # a flag of config_flags
  return flag.config_filename


def _write_sheet(options: flags.FlagValues, opened: dict[str, Source]) -> list[str]:
  """Write the picture of these splits; return why some are missing from it."""
  sections, wrong = [], []
  for split, source in opened.items():
    train = split == options.config.data.train_split
    make = contact_sheet.training_section if train else contact_sheet.evaluation_section
    try:
      sections.append(make(source, options.config, options.images))
      if train and options.config.data.operations:
        sections.append(contact_sheet.views_section(source, options.config, _VIEWED))
    except DataError as e:
      wrong.append(f"{split} cannot be shown: {e}")
  if sections:
    try:
      contact_sheet.draw(sections)[0].save(options.sheet)
    except OSError as e:
      raise DataError(f"--sheet={options.sheet} cannot be written ({e.strerror}).") from e
    print(f"{options.sheet}: images with their labels, as the model gets them", flush=True)
  return wrong


def _inspect_split(options: flags.FlagValues, split: str, source: Source) -> list[str]:
  """Print what is in a split; return what is wrong with it."""
  wrong: list[str] = []
  shards, folder = source.shards, source.folder
  hashed = bool(shards) and all(shard.sha256 for shard in shards)
  everything = range(len(source))
  sample: Collection[int] = everything
  if 0 < options.sample < len(source):
    chosen = np.random.default_rng(0).choice(len(source), options.sample, replace=False)
    sample = frozenset(chosen.tolist())
  read = everything if options.check and not hashed else sorted(sample)
  with Progress(len(read), f"records of {split}") as progress:
    found = _look(source, read, sample, progress.add)
  for line in _report(split, source, found, len(sample)):
    print(line, flush=True)
  if found.bad:
    wrong.append(
      f"{len(found.bad):,} of the {len(read):,} records of {split} that were read are bad and "
      f"would be replaced: {'; '.join(found.bad[:_SHOWN])}{' ...' if found.bad[_SHOWN:] else ''}."
    )
  wrong += sorted(found.broken)
  if options.check and hashed and folder:
    with Progress(sum(shard.size or 0 for shard in shards), f"bytes of {split}") as progress:
      differ = checksums.verify(folder, shards, progress.add)
    good = len(shards) - len(differ)
    print(f"  checksums  {good:,} of {counted(len(shards), 'shard')} intact (SHA-256)", flush=True)
    wrong += differ
  elif options.check:
    print(f"  checksums  none; {_count(len(found.sizes), len(read))} records could be read")
  return wrong


@dataclasses.dataclass
class _Found:
  """Findings about some records.

  Attributes:
    labels: number of records by label.
    sizes: bytes of each image.
    heights: pixels, of each image that was decoded.
    widths: likewise.
    formats: number of decoded images by format.
    kinds: number of decoded images by oddity; see shards.KINDS.
    bad: why records are bad, a line for each.
    broken: why shards cannot be read, a sentence for each.
  """

  labels: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
  sizes: list[int] = dataclasses.field(default_factory=list)
  heights: list[int] = dataclasses.field(default_factory=list)
  widths: list[int] = dataclasses.field(default_factory=list)
  formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  bad: list[str] = dataclasses.field(default_factory=list)
  broken: set[str] = dataclasses.field(default_factory=set)

  def add(self, other: "_Found") -> None:
    """Add the findings about other records."""
    for field in dataclasses.fields(self):
      mine, more = getattr(self, field.name), getattr(other, field.name)
      mine.extend(more) if isinstance(mine, list) else mine.update(more)


def _look(
  source: Source, indices: Sequence[int], decoded: Container[int], report: Callable[[int], None]
) -> _Found:
  """Read records in threads, decode those in `decoded`, and report how many are done."""
  found = _Found()
  with futures.ThreadPoolExecutor() as pool:
    chunk_size = _CHUNK if source.indexed else len(indices)
    chunks = [indices[i : i + chunk_size] for i in range(0, len(indices), chunk_size)]
    waiting = [pool.submit(_look_at, source, chunk, decoded) for chunk in chunks]
    try:
      for chunk, future in zip(chunks, waiting, strict=True):
        found.add(future.result())
        report(len(chunk))
    finally:
      pool.shutdown(cancel_futures=True)
  return found


def _look_at(source: Source, indices: Sequence[int], decoded: Container[int]) -> _Found:
  found = _Found()
  for index, get in source.read_each(indices):
    try:
      record = get()
    except BadRecordError as e:
      found.bad.append(one_line(str(e)))
      continue
    except DataError as e:
      found.broken.add(str(e))
      continue
    found.labels[record.label] += 1
    found.sizes.append(len(record.image))
    if index in decoded:
      rgb, kinds, reason = shards_lib.inspect(record.image, record.name)
      if rgb is None:
        found.bad.append(one_line(f"{record.name}: {reason}"))
        continue
      found.kinds.update(kinds)
      found.heights.append(rgb.shape[0])
      found.widths.append(rgb.shape[1])
      found.formats[_MAGIC.get(record.image[:2], "other")] += 1
  return found


def _report(split: str, source: Source, found: _Found, sample: int) -> list[str]:
  """Return the lines to print.

  Args:
    split: its name.
    source: all of its records.
    found: those that were read.
    sample: how many of these were to be decoded.
  """
  read = len(found.sizes) + len(found.bad)
  total = f"{counted(len(source), 'record')} of {counted(source.num_classes, 'class')}"
  labels: Mapping[int, int] = found.labels
  origin = f" of the {read:,} read" if read < len(source) else ""
  if source.class_counts:
    labels, origin = dict(enumerate(source.class_counts)), ""
  if source.shards and all(shard.size for shard in source.shards):
    size = sum(shard.size or 0 for shard in source.shards)
    total += f", {size / 2**20:,.1f} MiB in {counted(len(source.shards), 'shard')}"
  else:
    total += f", {sum(found.sizes) / 2**20:,.1f} MiB of images"
    total += f" in the {read:,} that were read" if read < len(source) else ""
  lines = [f"{split}: {total}"]
  counts = [labels[label] for label in range(source.num_classes)]
  lines.append(
    f"  classes    {min(counts):,} to {max(counts):,} records each{origin}, "
    f"median {np.median(counts):,g}"
  )
  ranked = sorted(range(source.num_classes), key=lambda label: (counts[label], label))
  ends = [ranked] if len(ranked) <= 2 * _SHOWN else [ranked[:_SHOWN], ranked[-_SHOWN:]]
  named = [", ".join(f"{source.class_names[i]} ({i}): {counts[i]:,}" for i in end) for end in ends]
  # A name is not broken.
  text = " ... ".join(named).replace(" ", _HARD).replace(f",{_HARD}", ", ")
  lines += [
    line.replace(_HARD, " ")
    for line in textwrap.wrap(
      text, _WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 13, break_long_words=False
    )
  ]
  lines.append(f"  file bytes {_spread(found.sizes)}")
  of = f", of {sample:,} that were decoded" if sample < len(source) else ""
  lines.append(f"  height     {_spread(found.heights)} pixels{of}")
  lines.append(f"  width      {_spread(found.widths)} pixels{of}")
  formats = [f"{name} {_count(n, len(found.heights))}" for name, n in found.formats.most_common()]
  lines.append(f"  formats    {', '.join(formats) or 'none'}{of}")
  for kind, n in found.kinds.most_common():
    share = _count(n, len(found.heights))
    lines.append(f"             {kind.replace('_', ' ')} {share}: {shards_lib.KINDS[kind]}")
  return lines


def _count(part: int, whole: int) -> str:
  return f"{part:,} ({part / max(whole, 1):.1%})"


def _spread(values: Sequence[int]) -> str:
  """Return the extremes, the median and outer quantiles of values."""
  if not values:
    return "unknown"
  names = ("least", "5 %", "median", "95 %", "most")
  numbers = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
  return ", ".join(f"{name} {number:,.0f}" for name, number in zip(names, numbers, strict=True))
