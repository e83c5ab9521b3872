"""Make ArrayRecord shards and a manifest of ImageNet's archives, a folder, a tar or parquet.

    python -m input_pipeline.prepare --out DIR --imagenet-train ILSVRC2012_img_train.tar \\
        --imagenet-val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz
    python -m input_pipeline.prepare --out gs://BUCKET/FOLDER --from hf:imagenet-1k

The images are shuffled and dealt to shards. Each is decoded once, and whatever is odd about it is
listed in DIR/manifest.json. The bytes of the images do not change. The result depends only on the
images, --seed, the numbers of shards and --max-size. To resume a run that was stopped, give the
same command again: finished shards whose checksums match are kept. On the way to a bucket, each
worker process has one shard on the local disk, in TMPDIR. Parquet is read as a stream and shuffled
by row group, then within each shard: a shard holds whole row groups.
"""

import argparse
import collections
from collections.abc import Iterator, Sequence
import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
from typing import Any

from configs import arguments
from configs.data_fields import FAULTS
from configs.names import counted
from input_pipeline import records
from input_pipeline.errors import DataError, one_line
from input_pipeline.prepare import archives as inputs
from input_pipeline.prepare import hf as hf_inputs
from input_pipeline.prepare import imagenet, pool, shards
from input_pipeline.prepare import output as outputs
from input_pipeline.sources import layout, splits
from input_pipeline.sources.base import HF_PREFIX
from input_pipeline.workers import processes

# Target size of a shard: large enough to copy efficiently, and 1,024 of them hold ImageNet.
_SHARD_BYTES = 128 << 20
_MAX_SHARDS = 1024
_LEFT_OUT = "left_out.json"  # beside the shards: all files that are no record, by reason
_SHARD = re.compile(r"(train|val|test)-\d{5}-of-\d{5}\.array_record")
_TEMPORARY = re.compile(rf"\.{_SHARD.pattern}\.\d+\.tmp")


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command; return 0, 1 after a failure, in one sentence, or 130 if interrupted."""
  args = _parser().parse_args(argv)
  try:
    prepare(args)
  except DataError as e:
    print(f"prepare: {e}", file=sys.stderr)
    return 1
  except OSError as e:
    print(f"prepare: {e.filename or args.out}: {e.strerror}.", file=sys.stderr)
    return 1
  except MemoryError:
    print(
      "prepare: there is no memory left; the same command resumes from the finished shards, with "
      "fewer --workers.",
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt:
    print(
      "prepare: interrupted; the same command resumes from the finished shards.", file=sys.stderr
    )
    return 130
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = arguments.Parser(
    prog="python -m input_pipeline.prepare",
    usage="python -m input_pipeline.prepare --out DIR IMAGES [FLAG ...]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--out",
    type=arguments.path,
    required=True,
    metavar="DIR",
    help="where the shards and manifest.json go: a folder, or gs://BUCKET/FOLDER",
  )
  what = parser.add_argument_group("images, one of")
  what.add_argument(
    "--imagenet-train",
    type=arguments.path,
    metavar="TAR",
    help="ILSVRC2012_img_train.tar: a tar of one tar per class",
  )
  what.add_argument(
    "--imagenet-val",
    type=arguments.path,
    metavar="TAR",
    help="ILSVRC2012_img_val.tar; needs --devkit or --val-labels",
  )
  what.add_argument(
    "--folder",
    type=arguments.path,
    metavar="DIR",
    help="{train,val,test}/CLASS/IMAGE, or CLASS/IMAGE: split train; images are files named *"
    + ", *".join(layout.IMAGE_SUFFIXES),
  )
  what.add_argument(
    "--tar",
    type=arguments.path,
    metavar="TAR",
    help="the same in an uncompressed tar, with or without a leading folder",
  )
  what.add_argument(
    "--from",
    dest="hf",
    metavar="hf:PATH",
    help="parquet: hf:NAME[:CONFIG][@REVISION] on the Hugging Face hub, with a token in HF_TOKEN, "
    "or hf:FOLDER, local, gs:// or https://",
  )
  what.add_argument(
    "--digits",
    action="store_true",
    help="scikit-learn's 1,797 handwritten digits as 32x32 JPEGs, 10 classes; needs no file",
  )
  labels = parser.add_argument_group("classes of --imagenet-val, one of")
  labels.add_argument(
    "--devkit", type=arguments.path, metavar="TGZ", help="ILSVRC2012_devkit_t12.tar.gz"
  )
  labels.add_argument(
    "--val-labels",
    type=arguments.path,
    metavar="TXT",
    help="one synset per line, in the order of the image names, or IMAGE and synset",
  )
  what_is = parser.add_argument_group("what is what, where it is not clear")
  what_is.add_argument(
    "--split",
    action="append",
    default=[],
    metavar="NAME=FOUND",
    help="make the split NAME (train, val, test) of the one that is called FOUND there; NAME= "
    "(nothing) leaves it out. By default train, val and test are made, by any of their usual names",
  )
  what_is.add_argument("--val-split", default="", metavar="NAME", help="same as --split val=NAME")
  what_is.add_argument(
    "--val-fraction",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="of --folder and --tar without a split val: share of the images of each class, as 0.1, "
    "that are held out of train as val, chosen by --seed",
  )
  what_is.add_argument(
    "--image-column", default="", metavar="NAME", help="column of the images of --from"
  )
  what_is.add_argument(
    "--label-column", default="", metavar="NAME", help="column of the labels of --from"
  )
  what_is.add_argument(
    "--classes",
    type=int,
    default=0,
    metavar="N",
    help="number of classes of --from, where labels are integers without names",
  )
  what_is.add_argument(
    "--allow",
    default="",
    metavar="FAULT,...",
    help="faults that are not refused: empty_class, a class without images | deeper, images of a "
    "class in several folders | missing_file, gaps in numbered parquet files | behind_end, more "
    "behind the end of a tar, which is left out | one_class, images of a single class",
  )
  how = parser.add_argument_group("how")
  how.add_argument(
    "--shards",
    type=int,
    default=0,
    metavar="N",
    help="shards of train; 0 (default): as many as give about 128 MiB each, at most 1024",
  )
  how.add_argument(
    "--val-shards", type=int, default=0, metavar="N", help="shards of val; 0 as above"
  )
  how.add_argument(
    "--seed", type=int, default=0, metavar="N", help="seed of the order of the records (default 0)"
  )
  how.add_argument(
    "--max-size",
    type=int,
    default=0,
    metavar="PX",
    help="shrink images whose shorter side is longer than PX to PX (bicubic, antialiased) and "
    "encode them again as RGB JPEG of quality 95, 4:4:4; others do not change. Decoding is about "
    "twice as fast at 256, but the data are no longer the originals. 0 (default): no change",
  )
  how.add_argument(
    "--workers", type=int, default=0, metavar="N", help="processes; 0 (default): one per core"
  )
  how.add_argument(
    "--overwrite", action="store_true", help="first delete the shards of another run in --out"
  )
  return parser


def prepare(args: argparse.Namespace) -> None:
  """Do the work of the command.

  Args:
    args: the parsed flags.

  Raises:
    DataError: the flags, the images or the disk are at fault; one sentence.
  """
  _check(args)
  count = args.workers or processes.cores()
  output = outputs.open_output(args.out)
  with _locked(output), pool.start(count) as workers:
    print("listing the images", flush=True)
    found = _find(args, workers.executor.map if workers else map)
    if "train" in found.splits and layout.ONE_CLASS not in layout.words(args.allow):
      where = args.folder or args.tar or args.hf or args.imagenet_train
      layout.check_classes(where, found.classes, found.left_out)
    counts = {split: _shard_count(split, found, args) for split in found.splits}
    for split, number in counts.items():
      print(
        f"{split}: {counted(found.count(split), 'image')} of "
        f"{counted(len(found.classes), 'class')}, {counted(number, 'shard')} to make",
        flush=True,
      )
    for note in found.notes:
      print(one_line(note), flush=True)
    left_out = {reason: sorted(paths) for reason, paths in found.left_out.items()}
    if number := sum(map(len, left_out.values())):
      print(f"ignored {counted(number, 'file')}, listed in {args.out}/{_LEFT_OUT}", flush=True)
      for line in layout.in_words(left_out):
        print(f"  {line}", flush=True)
    plan = {
      "format_version": records.FORMAT_VERSION,
      "source": found.origin,
      "images": found.fingerprint(),
      "seed": args.seed,
      "shards": counts,
      "max_size": args.max_size,
    }
    sizes = {split: found.size(split) for split in found.splits}
    needed = sum(sizes.values())
    if output.scratch != args.out:  # one shard of each worker at a time
      needed = min(needed, count * max(sizes[split] // counts[split] for split in sizes))
    _start(args, output, plan, needed)
    tasks = {
      split: [
        shards.Task(args.out, records.shard_name(split, i, counts[split]), images, args.max_size)
        for i, images in enumerate(found.deal(split, counts[split], args.seed))
      ]
      for split in found.splits
    }
    if left_out:
      output.write_json(_LEFT_OUT, left_out)
    entries = pool.make_all(list(itertools.chain(*tasks.values())), workers)
    manifest = _manifest(
      plan,
      found.classes,
      {s: [entries[t.file] for t in tasks[s]] for s in tasks},
      layout.EMPTY_CLASS in layout.words(args.allow),
    )
    if left_out:
      manifest["left_out"] = {reason: len(paths) for reason, paths in left_out.items()}
    output.write_json(records.MANIFEST, manifest)
  print(summary(manifest), flush=True)


def _check(args: argparse.Namespace) -> None:
  """Raise DataError if flags are missing or contradict each other."""
  imagenet = bool(args.imagenet_train or args.imagenet_val)
  if imagenet + bool(args.folder) + bool(args.tar) + bool(args.hf) + args.digits != 1:
    raise DataError(
      "give exactly one of --imagenet-train/--imagenet-val, --folder, --tar, --from, --digits."
    )
  if args.hf and not args.hf.startswith(HF_PREFIX):
    raise DataError(
      f"--from is {args.hf}; parquet begins with {HF_PREFIX}, as {HF_PREFIX}{args.hf}. Images are "
      "given as --folder or --tar."
    )
  if args.folder and os.path.abspath(args.folder) == os.path.abspath(args.out):
    raise DataError(f"--out is {args.out}, the folder of the images; give another.")
  if args.val_split and not args.hf:
    raise DataError("--val-split names a split of --from, which is not given.")
  if (args.image_column or args.label_column or args.classes) and not args.hf:
    raise DataError(
      "--image-column, --label-column and --classes describe --from, which is not given."
    )
  if not 0 <= args.val_fraction < 1:
    raise DataError(f"--val-fraction is {args.val_fraction:g}; it must be in [0, 1).")
  if args.val_fraction and not (args.folder or args.tar):
    raise DataError("--val-fraction is of --folder or --tar, none of which is given.")
  if args.split and not (args.hf or args.folder or args.tar):
    raise DataError("--split names splits of --folder, --tar or --from, none of which is given.")
  for word in layout.words(args.allow):
    if word not in FAULTS:
      raise DataError(f"--allow={word} is no fault; there is {', '.join(FAULTS)}.")
  if args.devkit and args.val_labels:
    raise DataError("give --devkit or --val-labels, not both.")
  if (args.devkit or args.val_labels) and not args.imagenet_val:
    raise DataError("--devkit and --val-labels label --imagenet-val, which is not given.")
  for name in ("shards", "val_shards", "seed", "max_size", "workers", "classes"):
    if getattr(args, name) < 0:
      raise DataError(f"--{name.replace('_', '-')} must not be negative.")


def _find(args: argparse.Namespace, run: imagenet.Map) -> inputs.Inputs | hf_inputs.HfInputs:
  allow = layout.words(args.allow)
  asked = _asked_splits(args)
  held_out = inputs.HeldOut(args.val_fraction, args.seed)
  if args.hf:
    columns = (args.image_column, args.label_column)
    return hf_inputs.from_hf(args.hf, asked, columns, args.classes or None, allow)
  if args.digits:
    return inputs.from_digits(args.seed)
  if args.folder:
    return inputs.from_folder(args.folder, asked, allow, held_out)
  if args.tar:
    return inputs.from_tar(args.tar, asked, allow, held_out)
  return imagenet.from_imagenet(
    args.imagenet_train, args.imagenet_val, args.devkit, args.val_labels, run, allow
  )


def _asked_splits(args: argparse.Namespace) -> dict[str, str]:
  """Return the splits that --split and --val-split name; raise DataError if one makes no sense."""
  asked: dict[str, str] = {"val": args.val_split} if args.val_split else {}
  for word in args.split:
    name, equals, found = word.partition("=")
    if not name or not equals or (found and name not in splits.SYNONYMS):
      raise DataError(
        f"--split={word} must be NAME=FOUND, with NAME one of {', '.join(splits.SYNONYMS)}, or "
        "FOUND= to leave that out."
      )
    if asked.setdefault(name, found) != found:
      raise DataError(f"--split names {name} twice; give it once.")
  return asked


def _shard_count(
  split: str, found: inputs.Inputs | hf_inputs.HfInputs, args: argparse.Namespace
) -> int:
  wanted = args.shards if split == "train" else args.val_shards
  most, what = found.most_shards(split)
  if wanted > most:
    raise DataError(f"{wanted} shards are more than the {most} {what} of {split}.")
  return wanted or max(1, min(_MAX_SHARDS, most, -(-found.size(split) // _SHARD_BYTES)))


def _start(
  args: argparse.Namespace, output: outputs.Output, plan: dict[str, Any], size: int
) -> None:
  """Prepare the output folder for `plan`; raise DataError if it holds other shards."""
  file = f"{shards.JOURNAL}/plan.json"
  ours = [n for n in output.names() if n == records.MANIFEST or _SHARD.fullmatch(n)]
  old = output.read_json(file)
  if old is not None or ours:
    differs = [key for key in plan if (old or {}).get(key) != plan[key]]
    if not differs:
      return
    if not args.overwrite:
      shown = ", ".join(
        "other images" if k == "images" else f"{k}={(old or {}).get(k)!r} instead of {plan[k]!r}"
        for k in differs
      )
      raise DataError(
        f"{args.out} holds shards made with {shown}; give the same options as then, another "
        "--out, or --overwrite to delete them."
      )
    for name in [*ours, shards.JOURNAL]:
      output.remove(name)
  free = shutil.disk_usage(output.scratch).free
  if not args.max_size and free < size:
    raise DataError(
      f"{output.scratch} has {free / 2**30:.1f} GiB free, but the shards need "
      f"{size / 2**30:.1f} GiB; make room or choose another folder."
    )
  output.write_json(file, plan)


@contextlib.contextmanager
def _locked(output: outputs.Output) -> Iterator[None]:
  """Lock the output folder for this process, and leave no partial file on the disk.

  Raises:
    DataError: another process has it.
  """
  with output.locked():
    try:
      _remove_temporaries(output.scratch)  # of a run that was killed
      yield
    finally:
      _remove_temporaries(output.scratch)  # of processes that were stopped


def _remove_temporaries(folder: str) -> None:
  for name in os.listdir(folder):
    if _TEMPORARY.fullmatch(name):
      os.remove(os.path.join(folder, name))


def _manifest(
  plan: dict[str, Any],
  classes: list[str],
  made: dict[str, list[dict[str, Any]]],
  allow_empty: bool,
) -> dict[str, Any]:
  """Return the manifest of finished shards; raise DataError if a split or class is lost."""
  described = {}
  for split, entries in made.items():
    counts: collections.Counter[int] = collections.Counter()
    problems: dict[str, list[str]] = collections.defaultdict(list)
    reasons: dict[str, str] = {}
    for entry in entries:
      counts.update({int(label): n for label, n in entry["class_counts"].items()})
      reasons |= entry["reasons"]
      for kind, names in entry["problems"].items():
        problems[kind] += names
    if not counts:
      raise DataError(f"not one image of {split} can be decoded: {next(iter(reasons.items()))}.")
    lost = {label for entry in entries for label in entry.get("lost_classes", ())}
    if (gone := sorted(lost - {str(label) for label in counts})) and not allow_empty:
      raise DataError(
        f"not one image of the class {classes[int(gone[0])]} of {split} can be decoded: "
        f"{next(iter(reasons.items()))}; replace them, or leave the class without images with "
        f"--allow={layout.EMPTY_CLASS}."
      )
    described[split] = {
      "examples": counts.total(),
      "class_counts": [counts[label] for label in range(len(classes))],
      "reencoded": sum(entry["reencoded"] for entry in entries),
      "problems": {kind: sorted(problems[kind]) for kind in sorted(problems)},
      "reasons": dict(sorted(reasons.items())),
      "shards": [
        {key: entry[key] for key in ("file", "examples", "bytes", "sha256")} for entry in entries
      ],
    }
  return {
    **{k: plan[k] for k in ("format_version", "source", "seed", "max_size")},
    "checksum": "sha256",
    "classes": classes,
    "splits": described,
  }


def summary(manifest: dict[str, Any]) -> str:
  """Return a summary of a manifest: counts, and what is odd about which images."""
  lines = []
  for split, made in manifest["splits"].items():
    size = sum(shard["bytes"] for shard in made["shards"])
    counts = made["class_counts"]
    lines.append(
      f"{split}: {counted(made['examples'], 'record')} in {counted(len(made['shards']), 'shard')}, "
      f"{size / 2**20:,.1f} MiB, "
      f"{min(counts):,} to {max(counts):,} of each of {counted(len(counts), 'class')}"
    )
    if manifest["max_size"]:
      lines.append(f"  {made['reencoded']:,} shrunk to {manifest['max_size']} pixels")
    for kind, names in made["problems"].items():
      lines.append(
        f"  {kind.replace('_', ' ')}: {len(names):,} ({shards.KINDS[kind]}), for example {names[0]}"
      )
    lines += [f"    {name}: {reason}" for name, reason in made["reasons"].items()]
  return "\n".join(lines)


if __name__ == "__main__":
  # SIGTERM ends like Ctrl-C.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.exit(main())
