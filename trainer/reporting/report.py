"""One page about a run or several: results, curves, classes, images, time, data, config.

    python -m trainer.report WORKDIR [--mistakes=N] [--picture=FILE.png]
    python -m trainer.report runs/* [--out=FILE.html]

writes report.html, a single file without links to anything, from what a run left in its workdir: of
one run to WORKDIR/report.html, of several to the folder that they lie in. --mistakes=N looks at N
images of the evaluated split with the newest weights, on the CPU, and shows the most confident
mistakes. --picture also writes a PNG of result, first curves and wall time of one run, small enough
to be sent or committed.
"""

from collections.abc import Sequence
import os
import sys

from etils import epath

from configs import arguments
from input_pipeline.errors import DataError
from input_pipeline.remote import has_scheme
from trainer.errors import TrainerError
from trainer.reporting import page, picture, recorded
from trainer.workdir import storage
from trainer.workdir.paths import Workdir


def write_report(workdir: str) -> str:
  """Write the report of a run, finished or not.

  Args:
    workdir: folder of the run, local or gs://.

  Returns:
    The path of the report, WORKDIR/report.html; one that is already there is replaced.

  Raises:
    ValueError: if the run has logged nothing yet, or the folder is no workdir.
    ConfigError: if it is a bucket that cannot be used.
    TrainerError: if a file of it cannot be read.
  """
  return write_reports([workdir])


def write_reports(workdirs: Sequence[str], out: str = "") -> str:
  """Write the report of several runs side by side, or of one.

  Args:
    workdirs: folders of the runs, local or gs://. Of several, those without a run are left out.
    out: file to write; "" for report.html in the workdir, or in the folder that all lie in.

  Returns:
    The path of the report.

  Raises:
    ValueError, TrainerError: as `write_report` does, if no run is left.
  """
  found, troubles = list[recorded.Recorded](), list[Exception]()
  for workdir in workdirs:
    try:
      found.append(recorded.read(workdir))
    except (ValueError, NotADirectoryError) as trouble:
      troubles.append(trouble)
  if not found:
    raise troubles[0]
  if len(workdirs) > 1:
    for left_out in troubles:
      print(f"Left out: {left_out}", file=sys.stderr)
  path = storage.path_of(out) if out else _place(found)
  storage.write_whole(path, page.html_of(found))
  return str(path)


def _place(runs: Sequence[recorded.Recorded]) -> epath.Path:
  if len(runs) == 1:
    return runs[0].run.report
  paths = [str(run.run.path) for run in runs]
  scheme = "gs://" if all(path.startswith("gs://") for path in paths) else ""
  shared = os.path.commonpath([path.removeprefix(scheme) for path in paths])
  return Workdir(storage.path_of(scheme + shared)).report


def main(words: Sequence[str] | None = None) -> int:
  """Write the report of the workdirs named in a command line; return the exit code."""
  parser = arguments.Parser(prog="python -m trainer.report", description=__doc__.split("\n")[0])
  parser.add_argument("workdir", nargs="+", help="folder of a run")
  parser.add_argument(
    "--out", type=arguments.path, metavar="FILE.html", default="", help="where the page goes"
  )
  parser.add_argument(
    "--picture", type=arguments.path, metavar="FILE.png", help="also write a small picture of it"
  )
  parser.add_argument(
    "--mistakes", type=int, default=0, metavar="N", help="look for mistakes in N images"
  )
  options = parser.parse_args(words)
  workdirs = [w for w in options.workdir if len(options.workdir) == 1 or not _is_file(w)]
  try:
    if len(workdirs) != 1 and (options.picture or options.mistakes):
      raise ValueError("--picture and --mistakes are for one run; give one workdir.")
    _check_files(options.out, options.picture)
    if options.mistakes:
      # Imported here: only this needs a model.
      from trainer.reporting import examples

      examples.write_mistakes(workdirs[0], options.mistakes)
    print(write_reports(workdirs, options.out))
    if options.picture:
      picture.write_picture(workdirs[0], options.picture)
  except (ValueError, TrainerError, DataError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  return 0


def _check_files(*paths: str | None) -> None:
  """Raise ValueError if a file that is asked for has no folder to lie in."""
  for path in filter(None, paths):
    if not has_scheme(path) and not os.path.isdir(os.path.dirname(path) or "."):
      raise ValueError(f"{path} cannot be written: there is no folder {os.path.dirname(path)}.")


def _is_file(workdir: str) -> bool:
  """Whether `runs/*` has found something that is no folder, as an earlier report of all."""
  return "://" not in workdir and os.path.isfile(workdir)
