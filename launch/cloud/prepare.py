"""launch/tpu prepare: input_pipeline.prepare on a machine that deletes itself."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import tempfile

from launch.cloud import bundle, commands
from launch.cloud.commands import Line
from launch.cloud.gcloud import Gcloud
from launch.cloud.settings import LAUNCHER, Place, UsageError, describe_seconds, duration, label

SCRIPT = bundle.ROOT / "launch" / "prepare_imagenet.sh"
_ARGUMENTS = (
  "--imagenet-train=ILSVRC2012_img_train.tar",
  "--imagenet-val=ILSVRC2012_img_val.tar",
  "--devkit=ILSVRC2012_devkit_t12.tar.gz",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A machine and its work; `arguments` of input_pipeline.prepare have paths below `source`."""

  place: Place
  owner: str
  source: str
  out: str
  machine: str
  disk_gb: int
  service_account: str
  max_seconds: float
  arguments: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the arguments of the verb."""
  parser.add_argument("--source", required=True, metavar="gs://B/F", help="folder of the archives")
  parser.add_argument(
    "--out",
    required=True,
    metavar="gs://B/F",
    help="folder for the shards, the --config.data.path of a run",
  )
  parser.add_argument(
    "--machine",
    default="n2-standard-32",
    help="more cores decode faster (default n2-standard-32)",
  )
  parser.add_argument(
    "--disk-gb",
    type=int,
    default=500,
    help="for archives and shards (default 500)",
  )
  parser.add_argument(
    "--service-account", default="", help="default: the project's Compute Engine one"
  )
  parser.add_argument(
    "--max-time",
    type=duration,
    default=12 * 3600.0,
    metavar="TIME",
    help="after which the cloud deletes the machine in any case (default 12h)",
  )
  parser.add_argument(
    "--argument",
    action="append",
    default=[],
    metavar="WORD",
    help="argument of input_pipeline.prepare, in place of those for the archives of ILSVRC2012, "
    "as in --argument=--folder=images",
  )


def plan(args: argparse.Namespace, place: Place) -> Plan:
  """Returns the checked plan.

  Raises:
    UsageError: naming the argument that is wrong.
  """
  for name in ("source", "out"):
    if not re.fullmatch(
      r"gs://[a-z0-9][-_.a-z0-9]+[a-z0-9](/[-_.a-zA-Z0-9]+)*/?", getattr(args, name)
    ):
      raise UsageError(f"--{name} {getattr(args, name)!r} must be gs://BUCKET/FOLDER.")
  if not re.fullmatch(r"[a-z0-9-]+", args.machine):
    raise UsageError(f"--machine {args.machine!r} is not a machine type.")
  if args.disk_gb < 20:
    raise UsageError(f"--disk-gb {args.disk_gb} is too small.")
  if args.service_account and not re.fullmatch(r"[^@\s,=]+@[^@\s,=]+", args.service_account):
    raise UsageError(f"--service-account {args.service_account!r} is not valid.")
  if any("\n" in word for word in args.argument):
    raise UsageError("--argument must be one line.")
  return Plan(
    place,
    label(args.owner or "me"),
    args.source.rstrip("/"),
    args.out.rstrip("/"),
    args.machine,
    args.disk_gb,
    args.service_account,
    args.max_time,
    tuple(args.argument) or _ARGUMENTS,
  )


def create(wanted: Plan) -> Line:
  """Create the machine; the cloud itself deletes it at the time limit."""
  place = wanted.place
  metadata = {"prepare-url": place.url, "prepare-source": wanted.source, "prepare-out": wanted.out}
  return [
    "gcloud",
    "compute",
    "instances",
    "create",
    place.run,
    f"--machine-type={wanted.machine}",
    "--image-family=debian-12",
    "--image-project=debian-cloud",
    f"--boot-disk-size={wanted.disk_gb}GB",
    "--boot-disk-type=pd-ssd",
    "--scopes=cloud-platform",
    *([f"--service-account={wanted.service_account}"] if wanted.service_account else []),
    f"--max-run-duration={round(wanted.max_seconds)}s",
    "--instance-termination-action=DELETE",
    "--metadata=" + ",".join(f"{key}={value}" for key, value in metadata.items()),
    f"--metadata-from-file=startup-script={SCRIPT}",
    f"--labels=run={place.run},owner={wanted.owner},launcher={LAUNCHER}",
    f"--project={place.project}",
    f"--zone={place.zone}",
    "--quiet",
  ]


def lines(wanted: Plan) -> list[Line]:
  """Returns the lines that `run` runs, and makes the files that they need."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f"tpu-{wanted.place.run}-"))
  return [*_uploads(wanted, folder), create(wanted)]


def _uploads(wanted: Plan, folder: pathlib.Path) -> list[Line]:
  """Make in a folder what the machine fetches; return the lines that upload it."""
  place = wanted.place
  archive, _ = bundle.pack(bundle.look(), folder)
  (folder / "arguments").write_text("".join(f"{word}\n" for word in wanted.arguments))
  return [
    commands.upload(place, str(archive), f"{place.url}/code.tar.gz"),
    commands.upload(place, str(folder / "arguments"), f"{place.url}/arguments"),
  ]


def run(wanted: Plan) -> int:
  """Create the machine and return; it works unattended."""
  place, gcloud = wanted.place, Gcloud(300)
  with tempfile.TemporaryDirectory() as folder:
    for line in _uploads(wanted, pathlib.Path(folder)):
      gcloud.run(line)
  gcloud.run(create(wanted), tries=1)
  log = commands.shell(commands.read(place, f"{place.url}/prepare.log"))
  print(
    f"The machine {place.run} prepares {wanted.out}. It deletes itself when it is done, at the "
    f"latest after {describe_seconds(wanted.max_seconds)}.\n"
    f"  log, at the end:  {log}\n"
    f"  meanwhile:        gcloud compute instances get-serial-port-output {place.run} "
    f"--project={place.project} --zone={place.zone}"
  )
  return 0
