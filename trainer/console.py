"""The command resnet-pod: what a run needs, from any folder.

    resnet-pod train --config=imagenet_resnet50 --workdir=runs/r50 --config.data.path=data/imagenet
    resnet-pod eval --workdir=runs/r50
    resnet-pod COMMAND --help

Each is `python -m MODULE` with the packages of this program, whatever lies in the working
directory; modules there, which a config may name, are found after all others.
"""

import os
import runpy
import sys

# Module, and what stands before the arguments.
COMMANDS = {
  "train": ("trainer", ()),
  "eval": ("trainer", ("--mode=eval",)),
  "prepare": ("input_pipeline.prepare", ()),
  "inspect": ("input_pipeline.inspect", ()),
  "report": ("trainer.report", ()),
  "watch": ("trainer.watch", ()),
  "predict": ("trainer.predict", ()),
  "weights": ("trainer.weights", ()),
  "plan": ("trainer.plan", ()),
  "preflight": ("launch.preflight", ()),
}


def main() -> None:
  """Run the command that the command line names; ends the process."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in ("-h", "--help"):
    width = max(map(len, COMMANDS))
    lines = [
      f"  {name:{width}}  python -m {' '.join((m, *o))}" for name, (m, o) in COMMANDS.items()
    ]
    print("\n".join([(__doc__ or "").rstrip(), "", *lines]))
    sys.exit(0)
  if name not in COMMANDS:
    print(f"resnet-pod has no command {name!r}; there is {', '.join(COMMANDS)}.", file=sys.stderr)
    sys.exit(2)
  module, before = COMMANDS[name]
  # First is the folder of the command itself, where no package of this program is.
  sys.path = [path for path in sys.path if path not in ("", os.getcwd())] + [os.getcwd()]
  sys.argv = [f"resnet-pod {name}", *before, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)
