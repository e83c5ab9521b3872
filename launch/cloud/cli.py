"""launch/tpu VERB [RUN] [options] [trainer flags]

    up       get a slice for a run and train; the same command again reattaches or resumes
    watch    watch over a run that `up` started: show it, and replace a slice that it loses
    status   show a run once
    logs     print the log of any host, also after its slice is gone
    stop     save a checkpoint and end the trainer; the slice is kept, and paid for
    down     remove everything of a run that is paid for
    list     list the slices of a zone, their owners, and what is left over
    doctor   check account, project, quota, bucket and service account; print the fixes
    prepare  make the shards of ImageNet on a machine near the bucket

--dry-run prints the gcloud lines of a verb without running them. Exit codes: 0 done, 1 failed,
2 wrong arguments, 3 no capacity or does not fit, 4 the trainer crashes, 5 cost limit, 130 left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import difflib
import getpass
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from typing import NoReturn

from launch.cloud import bundle, checks, commands, doctor, dry, prepare, verbs
from launch.cloud.gcloud import GcloudError
from launch.cloud.run import noted
from launch.cloud.settings import (
  Place,
  Settings,
  UsageError,
  check,
  check_place,
  check_run,
  describe_seconds,
  duration,
  label,
)

USAGE, ERROR = 2, 1
_ANYBODY = ("root", "ubuntu", "user", "admin", "debian", "ec2-user", "jupyter", "vscode")
_DURATIONS = {
  "max-wait": "longest wait for a slice",
  "poll": "time between two turns",
  "stall": "time without a new step after which the trainer is restarted",
  "unreachable": "time without an answer of a host after which the slice is replaced",
  "start-limit": "longest time for hosts to answer, to install, and to return from repair",
  "provision-limit": "longest time in the state PROVISIONING",
  "exit-grace": "time for the other hosts to end when one has",
  "idle": "time without trainer and launcher after which the slice removes itself",
  "backoff": "first pause when there is no capacity",
  "call-limit": "longest time for one line of gcloud",
}


_VERBS = {
  "up": (
    "Get a slice for a run and train; the same command again reattaches or resumes.",
    "r50 --type=v5litepod-64 --spot --max-hours=12 --config=configs/imagenet_resnet50.py",
  ),
  "watch": (
    "Watch over a run that `up` started: show it, and replace a slice that it loses.",
    "r50",
  ),
  "status": ("Show a run once, with every host.", "r50"),
  "logs": ("Print the log of any host, also after its slice is gone.", "r50 --worker=all -f"),
  "stop": ("Save a checkpoint and end the trainer; the slice is kept, and paid for.", "r50"),
  "down": ("Remove everything of a run that is paid for.", "r50"),
  "list": ("List the slices of a zone, their owners, and what is left over.", "--zone=us-west4-a"),
  "doctor": (
    "Check account, project, quota, bucket and service account; print the fixes.",
    "--type=v5litepod-64 --service-account=pod@my-project.iam.gserviceaccount.com",
  ),
  "prepare": (
    "Make the shards of ImageNet on a machine near the bucket that deletes itself.",
    "shards --source=gs://my-bucket/archives --out=gs://my-bucket/imagenet",
  ),
}


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UsageError(
      f"{message[:1].upper()}{message[1:]}. See launch/tpu {self.prog.split()[-1]} --help."
    )


def parser() -> tuple[argparse.ArgumentParser, list[str]]:
  """Returns the parser of the whole command line, and the options of `up`."""
  top = _Parser(
    prog="launch/tpu",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  verbs_ = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

  def verb(
    name: str, run: str | None = "required", as_json: bool = True
  ) -> argparse.ArgumentParser:
    text, example = _VERBS[name]
    one = verbs_.add_parser(
      name,
      allow_abbrev=False,
      prog=f"launch/tpu {name}",
      description=f"{text}\n\n    launch/tpu {name} {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run:
      one.add_argument("run", metavar="RUN", nargs=None if run == "required" else "?", default="")
    where = one.add_argument_group(
      "where; defaults are those of the environment, then those of this run's last command"
    )
    where.add_argument("--project", help="default: CLOUDSDK_CORE_PROJECT, or that of gcloud")
    where.add_argument("--zone", help="default: CLOUDSDK_COMPUTE_ZONE")
    where.add_argument("--bucket", metavar="gs://B[/FOLDER]", help="default: TPU_BUCKET")
    where.add_argument("--owner", help="owner of the run (default: your user name)")
    one.add_argument(
      "--dry-run", action="store_true", help="print the gcloud lines without running them"
    )
    if as_json:
      one.add_argument("--json", action="store_true", help="print one JSON object per line")
    return one

  up = verb("up")
  _add_slice(up)
  up.add_argument(
    "--no-watch", action="store_true", help="return when the trainer runs; it is not restarted then"
  )
  up.add_argument(
    "--take-over", action="store_true", help="drive the run even if another launcher does"
  )
  up.add_argument(
    "--no-check", action="store_true", help="do not have the trainer check its config here first"
  )
  up.add_argument(
    "--preflight",
    action="store_true",
    help="first estimate memory, time and cost here, in minutes; ends with 3 if it does not fit",
  )
  watch = verb("watch")
  watch.add_argument(
    "--take-over", action="store_true", help="drive the run even if another launcher does"
  )
  verb("status")
  logs = verb("logs", as_json=False)
  logs.add_argument("--worker", default="0", metavar="N|all")
  logs.add_argument("--slice", type=int, default=0, metavar="N")
  logs.add_argument(
    "--attempt", type=int, metavar="N", help="of an earlier attempt, from the bucket"
  )
  logs.add_argument("--lines", type=int, default=50, metavar="N")
  logs.add_argument("-f", "--follow", action="store_true", help="print new lines as they come")
  verb("stop")
  down = verb("down", run="optional")
  down.add_argument(
    "--all",
    action="store_true",
    help="everything of yours in the zone, even without a run",
  )
  verb("list", run=None)
  doctor_ = verb("doctor", run="optional")
  doctor_.add_argument(
    "--type",
    default="",
    metavar="TYPE",
    help="also check that the zone offers this type",
  )
  doctor_.add_argument("--service-account", default="")
  prepare.add_arguments(verb("prepare", as_json=False))
  return top, re.findall(r"(?<![\w-])--[a-z-]+", up.format_help())


def _add_slice(up: argparse.ArgumentParser) -> None:
  what = up.add_argument_group("the slice")
  what.add_argument("--type", required=True, help="e.g. v5litepod-64, v4-32, v6e-16")
  what.add_argument("--slices", type=int, default=1, metavar="N")
  kind = what.add_mutually_exclusive_group()
  for name in ("on-demand", "spot", "reserved", "flex-start"):
    kind.add_argument(
      f"--{name}", dest="capacity", action="store_const", const=name, default="on-demand"
    )
  what.add_argument(
    "--reservation", default="", metavar="NAME", help="of --reserved: which one (alpha)"
  )
  what.add_argument("--runtime-version", default="", help="image of the hosts (default: by type)")
  what.add_argument(
    "--service-account", default="", help="of the hosts (default: the project's Compute Engine one)"
  )
  what.add_argument("--network", default="")
  what.add_argument("--subnetwork", default="")
  what.add_argument(
    "--internal-ips",
    action="store_true",
    help="no external addresses; implies --iap; installing needs Cloud NAT",
  )
  what.add_argument("--iap", action="store_true", help="ssh through Identity-Aware Proxy")
  what.add_argument(
    "--autocheckpoint",
    action="store_true",
    help="notify the trainer before host maintenance (alpha)",
  )
  what.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
  limits = up.add_argument_group("limits: durations as in 90s, 15m, 6h, 2d")
  limits.add_argument(
    "--max-hours",
    type=float,
    metavar="H",
    help="longest time that slices of this run may exist, over all attempts; enforced by the slice",
  )
  for name, text in _DURATIONS.items():
    default = getattr(Settings, name.replace("-", "_"))
    limits.add_argument(
      f"--{name}",
      type=duration,
      default=default,
      metavar="TIME",
      help=f"{text} (default {describe_seconds(default)})",
    )
  limits.add_argument("--keep", action="store_true", help="keep the slice when the run has ended")
  limits.add_argument(
    "--dollars-per-chip-hour",
    type=float,
    default=0.0,
    metavar="X",
    help="show the cost in dollars",
  )
  host = up.add_argument_group("the trainer")
  host.add_argument(
    "--env-file",
    default="",
    metavar="FILE",
    help="lines NAME=VALUE for the trainer, copied to the hosts by scp",
  )
  host.add_argument(
    "--secret",
    action="append",
    default=[],
    metavar="NAME=SECRET",
    help="variable of the trainer, read from Secret Manager by the hosts",
  )
  host.add_argument(
    "--python",
    default="",
    metavar="PATH",
    help="Python of an image with all packages: install nothing",
  )


def _place(args: argparse.Namespace, needs_bucket: bool = True) -> Place:
  """Returns the place of a run."""
  known = noted(args.run) if re.fullmatch(r"[-a-z0-9]+", getattr(args, "run", "")) else None

  def one(name: str, *variables: str) -> str:
    given = getattr(args, name) or next(
      (os.environ[key] for key in variables if os.environ.get(key)), ""
    )
    return given or (getattr(known.place, name) if known else "")

  place = Place(
    getattr(args, "run", ""),
    one("project", "CLOUDSDK_CORE_PROJECT"),
    one("zone", "CLOUDSDK_COMPUTE_ZONE"),
    one("bucket", "TPU_BUCKET").rstrip("/"),
  )
  if not place.project:
    place = dataclasses.replace(place, project=_gcloud_value(commands.default_project()))
  for name, example in (
    ("project", "my-project"),
    ("zone", "us-west4-a"),
    ("bucket", "gs://my-bucket"),
  ):
    if not getattr(place, name) and (name != "bucket" or needs_bucket):
      raise UsageError(f"--{name} is needed, as in --{name}={example}.")
  return place


def _gcloud_value(line: commands.Line) -> str:
  """Returns the only word that a line of gcloud prints, or ""."""
  try:
    done = subprocess.run(
      [os.environ.get("TPU_GCLOUD", "gcloud"), *line[1:]],
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
      timeout=30,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.strip()


def _owner(args: argparse.Namespace) -> str:
  """Returns the owner of what is made here.

  Many people are `ubuntu` on their machines; the account of gcloud distinguishes them, so that none
  removes the slices of another.
  """
  user = args.owner or getpass.getuser()
  if not args.owner and user in _ANYBODY:
    known = noted(args.run) if getattr(args, "run", "") else None
    account = known.owner if known else _gcloud_value(commands.default_account())
    user = account or f"{user}-{socket.gethostname()}"
  return label(user)


def settings_of(args: argparse.Namespace, trainer: Sequence[str]) -> Settings:
  """Returns the checked settings of `up`.

  Raises:
    UsageError: naming the argument that is wrong.
  """
  argv: list[str] = []
  for word in trainer:
    if argv and not word.startswith("--") and "=" not in argv[-1]:
      argv[-1] += f"={word}"  # --config configs/X.py
    else:
      argv.append(word)
  configs = [word for word in argv if word.split("=")[0] == "--config"]
  if len(configs) > 1:
    raise UsageError(f"--config is given {len(configs)} times.")
  argv = configs + [word for word in argv if word not in configs]  # its fields must follow it
  if args.max_hours is not None and not args.max_hours > 0:
    raise UsageError(f"--max-hours {args.max_hours:g} must be above 0.")
  durations = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _DURATIONS}
  settings = check(
    Settings(
      _place(args),
      _owner(args),
      checks.accelerator_type(args.type),
      args.slices,
      args.capacity,
      args.reservation,
      args.runtime_version,
      args.service_account,
      args.network,
      args.subnetwork,
      args.internal_ips,
      args.iap or args.internal_ips,
      args.autocheckpoint,
      tuple(_pair("label", text) for text in args.label),
      checks.env_file(args.env_file) if args.env_file else "",
      tuple(checks.secret(text) for text in args.secret),
      args.python,
      args.keep,
      tuple(argv),
      args.dollars_per_chip_hour,
      max_seconds=args.max_hours * 3600 if args.max_hours is not None else None,
      **durations,
    )
  )
  config = checks.config_of(settings.argv)
  if not (bundle.ROOT / config).is_file() or pathlib.Path(config).is_absolute():
    raise UsageError(
      f"--config={config} is not a file of {bundle.ROOT}, the folder that hosts get."
    )
  return settings


def _pair(name: str, text: str) -> tuple[str, str]:
  key, equals, value = text.partition("=")
  if not equals:
    raise UsageError(f"--{name} {text!r} must be KEY=VALUE.")
  return key, value


def main(argv: Sequence[str]) -> int:
  """Run a verb and return its exit code."""
  # A closed terminal, or SIGTERM, leaves as Ctrl-C does.
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)
  try:
    return _run(list(argv))
  except UsageError as error:
    print(f"launch/tpu: {error}", file=sys.stderr)
    return USAGE
  except GcloudError as error:
    print(
      f"launch/tpu: {' '.join(error.line[:5])}: {error}\nRun launch/tpu doctor to find the reason.",
      file=sys.stderr,
    )
    return ERROR
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  except BrokenPipeError:
    return ERROR


def _run(argv: list[str]) -> int:
  if not argv or (argv[0] not in _VERBS and not argv[0].startswith("-")):
    near = difflib.get_close_matches(argv[0], _VERBS, n=1) if argv else []
    hint = f"; did you mean {near[0]}?" if near else "."
    print(f"launch/tpu has no verb {argv[0]}{hint}\n" if argv else "", __doc__, file=sys.stderr)
    return USAGE
  end = argv.index("--") if "--" in argv else len(argv)
  top, options = parser()
  args, unknown = top.parse_known_args(argv[:end])
  trainer = unknown + argv[end + 1 :]
  if args.verb == "up":
    checks.trainer_flags(unknown, options)
  if args.verb != "up" and trainer:
    raise UsageError(f"launch/tpu {args.verb} has no option {trainer[0]}.")
  if args.verb == "up":
    settings = settings_of(args, trainer)
    if args.dry_run:
      return dry.show(dry.up(settings))
    how = verbs.Up(args.json, args.take_over, args.no_watch, args.no_check, args.preflight)
    return verbs.up(settings, how)
  if args.verb == "prepare":
    plan = prepare.plan(args, check_place(_place(args)))
    return dry.show(prepare.lines(plan)) if args.dry_run else prepare.run(plan)
  needs_run = args.verb in ("watch", "status", "logs", "stop") or (
    args.verb == "down" and not args.all
  )
  if needs_run:
    check_run(args.run)
  place = _place(args, needs_bucket=needs_run or args.verb == "doctor")
  if needs_run:
    check_place(place)
  return _run_verb(args, place)


def _run_verb(args: argparse.Namespace, place: Place) -> int:
  if args.verb == "logs":
    if not re.fullmatch(r"all|\d+", args.worker):
      raise UsageError(f"--worker {args.worker!r} must be a number or all.")
    request = verbs.LogRequest(args.worker, args.slice, args.attempt, args.lines, args.follow)
    return dry.show(dry.logs(place, request)) if args.dry_run else verbs.logs(place, request)
  if args.verb == "doctor":
    wanted = doctor.Wanted(
      dataclasses.replace(place, run=args.run), _owner(args), args.type, args.service_account
    )
    return dry.show(doctor.lines(wanted)) if args.dry_run else doctor.run(wanted, args.json)
  if args.verb == "down":
    return (
      dry.show(dry.down(place, args.all))
      if args.dry_run
      else verbs.down(place, _owner(args), args.all, args.json)
    )
  if args.verb == "list":
    return dry.show(dry.listing(place)) if args.dry_run else verbs.listing(place, args.json)
  if args.dry_run:
    return dry.show(getattr(dry, args.verb)(place))
  if args.verb == "watch":
    return verbs.watch(place, _owner(args), args.json, args.take_over)
  return getattr(verbs, args.verb)(place, _owner(args), args.json)
