"""Weights in and out.

  python -m trainer.weights import resnet50-0676ba61.pth --config=configs/X.py --workdir=DIR
  python -m trainer.weights export DIR --format=onnx --out=resnet50.onnx --pixels
  python -m trainer.weights show FILE
  python -m trainer.weights diff DIR FILE

FILE is safetensors, or what torch.save has written (read without running it), of torchvision, timm
or Hugging Face; local, gs://, or https:// with a checksum. DIR is the workdir of a run. Wherever
one is read, the other can be. The exit code is 0, or 2 with the reason in one sentence; of `diff`
also 1, if anything differs.
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys

# Converting weights needs no accelerator, and must not take one from a run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import logging

from configs import arguments
from input_pipeline.errors import DataError
from trainer.errors import DONE, FAILED, TrainerError
from trainer.weights.errors import WeightsError

_DIFFERENT = 1
_EMA = ("ema", "raw")


def _parser() -> arguments.Parser:
  parser = arguments.Parser(
    prog="python -m trainer.weights",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  verbs = parser.add_subparsers(required=True, metavar="import|export|show|diff", dest="verb")

  def add(name: str, text: str, example: str) -> arguments.Parser:
    verb: arguments.Parser = verbs.add_parser(
      name,
      help=text,
      description=f"{text[0].upper()}{text[1:]}.",
      epilog=f"example:\n  python -m trainer.weights {name} {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
      "--weights",
      choices=_EMA,
      default="ema",
      help="where there are both: averages over steps, as evaluation uses them (default), or raw",
    )
    return verb

  verb = add(
    "import",
    "write weights as the first checkpoint of a workdir",
    "resnet101.safetensors --config=configs/imagenet_resnet50.py --config.model.depth=101 "
    "--workdir=runs/r101",
  )
  verb.add_argument("file", metavar="FILE", help="file of weights, or another workdir")
  verb.add_argument("--workdir", required=True, metavar="DIR", help="new folder, local or gs://")
  verb.add_argument(
    "--classes", type=arguments.path, metavar="F", help="file of class names, one a line or as JSON"
  )
  verb.add_argument(
    "--config",
    required=True,
    metavar="X.py",
    help="run file; single fields by --config.FIELD=VALUE",
  )
  verb = add(
    "export",
    "write the weights of a workdir for other tools, and compare what is read back",
    "runs/r50 --format=onnx --out=r50.onnx --pixels --images=photos",
  )
  verb.add_argument("workdir", metavar="WORKDIR", help="workdir, or a file that export has written")
  verb.add_argument(
    "--format",
    required=True,
    choices=("safetensors", "onnx", "stablehlo"),
    help="safetensors in timm's names; ONNX; StableHLO for jax.export.deserialize",
  )
  verb.add_argument(
    "--names",
    default="timm",
    choices=("timm", "torchvision"),
    help="of tensors in safetensors, for nets whose names differ there",
  )
  verb.add_argument("--out", type=arguments.path, required=True, metavar="F", help="file to write")
  verb.add_argument(
    "--pixels",
    action="store_true",
    help="graphs take uint8 images [N, H, W, 3] and normalise them; otherwise normalised ones, "
    "ONNX [N, 3, H, W], StableHLO [N, H, W, 3]",
  )
  verb.add_argument(
    "--size", type=int, default=0, metavar="PX", help="of images of a graph (that of evaluation)"
  )
  verb.add_argument(
    "--images", type=arguments.path, default="", metavar="DIR", help="images to compare on (noise)"
  )
  verb = add("show", "print leaves, metadata and what the weights look like", "resnet50.pth")
  verb.add_argument("file", metavar="FILE", help="file of weights, or a workdir")
  verb = add("diff", "print the leaves that differ", "runs/r50 resnet50.safetensors")
  verb.add_argument("a", metavar="A", help="file of weights, or a workdir")
  verb.add_argument("b", metavar="B", help="file of weights, or a workdir")
  return parser


def _import(options: argparse.Namespace, program: str, overrides: list[str]) -> int:
  from trainer import command_line
  from trainer import config as config_lib
  from trainer.weights import about, net, read, run_folder

  command_line.parse([program, f"--config={options.config}", *overrides], "--config=configs/X.py")
  config = command_line.FLAGS.config
  config_lib.validate(config)
  model = net.build(config)
  leaves, facts = read.read_weights(options.file, model, options.weights == "ema")
  classes, named = facts.classes, options.file
  if options.classes:
    named = f"--classes={options.classes}"
    classes = about.read_classes(options.classes)
  about.check_classes(classes, config.model, named)
  run_folder.write(options.workdir, config, model, leaves, classes)
  print(
    f"{options.workdir}: checkpoint 0 of {model.describe()} with {len(leaves):,} leaves of "
    f"{options.file}" + (f", {len(classes):,} class names" if classes else ", no class names")
  )
  return DONE


def _export(options: argparse.Namespace) -> int:
  from trainer.weights import export

  if options.size < 0:
    raise WeightsError(f"--size={options.size} is no number of pixels.")
  agreement = export.export(
    options.workdir,
    options.format,
    options.out,
    averaged=options.weights == "ema",
    pixels=options.pixels,
    size=options.size,
    images=options.images,
    names=options.names,
  )
  size = pathlib.Path(options.out).stat().st_size / 2**20
  print(f"{options.out}: {size:,.1f} MiB; read back, {agreement}")
  return DONE


def _show(options: argparse.Namespace) -> int:
  from trainer.weights import read, show

  for line in show.show(read.load(options.file, options.weights == "ema")):
    print(line)
  return DONE


def _diff(options: argparse.Namespace) -> int:
  from trainer.weights import read, show

  a, b = (read.load(origin, options.weights == "ema") for origin in (options.a, options.b))
  lines = show.differences(a, b)
  for line in lines:
    print(line)
  leaves = len(a.tensors.keys() | b.tensors.keys())
  print(
    f"{len(lines):,} of {leaves:,} leaves differ" if lines else f"all {leaves:,} leaves are equal"
  )
  return _DIFFERENT if lines else DONE


def main(argv: Sequence[str]) -> int:
  """Run one verb; return its exit code."""
  logging.set_verbosity(logging.ERROR)  # Orbax logs every read
  parser = _parser()
  options, rest = parser.parse_known_args(argv[1:])
  verb = options.verb
  wrong = [
    argument for argument in rest if verb != "import" or not argument.startswith("--config.")
  ]
  if wrong:
    parser.error(f"unknown argument of {verb}: {wrong[0]}")
  try:
    if verb == "import":
      return _import(options, argv[0], rest)
    return {"export": _export, "show": _show, "diff": _diff}[verb](options)
  except (TrainerError, DataError) as error:
    print(error, file=sys.stderr)
    return FAILED


if __name__ == "__main__":
  sys.exit(main(sys.argv))
