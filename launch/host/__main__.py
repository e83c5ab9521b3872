"""The agent: what runs on each host of a slice, shipped as one zip file that Python runs.

    python3 agent.pyz gs://BUCKET/RUN VERB [argument]

    status          where this host is, as one line of JSON
    end ATTEMPT     end the trainer of an earlier attempt; status
    start ATTEMPT SHA    start the trainer of an attempt, once; SHA is that of its spec; status
    stop            ask the trainer to save and end, and keep the slice; status
    stacks          have the trainer write the stacks of its threads into its log; status
    tail LINES      the last lines of the trainer's log, each after the name of its host
    follow LINES    those, and all that follow

It needs Python 3.8 and no package, and runs as root; all state is in the folder that it lies in.
boot.sh starts its verb `guard` at every boot; `start` leaves the supervisor of a trainer behind.
"""

from __future__ import annotations

import json
import pathlib
import signal
import sys
import time

from launch.host import logs
from launch.host.guard import Guard
from launch.host.host import Host
from launch.host.supervisor import supervise


def main() -> None:
  """Run one verb."""
  argv = sys.argv
  url, verb = argv[1:3]
  host = Host(url, pathlib.Path(argv[0]).resolve().parent)
  if verb == "supervise":
    supervise(host)
    return
  if verb == "guard":
    Guard(host).run()
    return
  host.contacted()
  if verb in ("tail", "follow"):
    if host.log().exists():
      logs.tail(host.log(), host.name, int(argv[3]), follow=verb == "follow")
    else:
      print(f"[{host.name}] no trainer was started here yet", flush=True)
    return
  trouble = None
  try:
    if verb == "start":
      host.start(int(argv[3]), argv[4])
    elif verb == "end":
      host.end(int(argv[3]))
    elif verb == "stop":
      host.stop()
    elif verb == "stacks":
      host.signal_trainer(signal.SIGUSR1)  # faulthandler of trainer.__main__
      time.sleep(1)
      host.upload_log()
    host.keep_guard()
  except (OSError, RuntimeError) as error:
    trouble = str(error)
  status = host.status()
  # One write: an unbuffered print() writes the line's end by itself, after that of another host.
  sys.stdout.write(json.dumps(dict(status, trouble=trouble or status["trouble"])) + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  main()
