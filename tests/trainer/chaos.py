"""A training run hit by every kind of failure, and the proof that none leaves a trace.

    python -m tests.trainer.chaos [--events N] [--seed N] [--folder DIR] [--patience N]

Real processes train a tiny net on 1, 2 or 4 hosts while random events hit them: SIGTERM, SIGHUP,
SIGKILL or SIGSTOP of a random host, a decoding process that is killed or hangs, a second run in the
same workdir, a restart on another number of hosts, damage of the newest checkpoint or of a small
file of the workdir, and other data in the place of those of the run, which are put back later.

After each event every process must be gone within a time limit, with the right exit code, and the
next start must resume from the newest whole checkpoint. What may be lost: after SIGKILL or SIGSTOP
the steps since the save before the last one that was due; with a damaged checkpoint those since the
one before; else nothing, and never the count of starts. At the end every stretch on one number of
hosts is trained again without events: its checkpoints must be equal bit for bit. Needs two cores
and, for thirty events, about half an hour; `--patience` multiplies all time limits, for a machine
with other work.
"""

import argparse
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import time
from typing import NamedTuple

import numpy as np
from PIL import Image
import psutil

from tests.trainer.shared import LocalPod, fingerprints, trainer

EVENTS = (
  *("SIGTERM", "SIGKILL", "SIGSTOP", "resize", "damage"),
  *("SIGHUP", "worker", "owner", "files", "data"),
)
HOSTS = (2, 1, 4)
EVERY = 20  # steps between checkpoints and between lines of the log
STEPS_PER_EVENT = 120  # most events come within the first hundred of a start
SILENCE = 8  # seconds after which a host is lost
# Seconds in which every process must be gone after an event; an idle machine needs a fifth of it.
LIMIT = 60
START = 240  # seconds until the first line of progress
HANGS = 8  # seconds after which a decoding process hangs, twice
WRITTEN = ("starts.json", "config.json", "classes.json", "data.json")  # by each start
SMALL = (*WRITTEN, "final.json", "owner.json")


class Limits(NamedTuple):
  """Time limits in seconds, times the patience of the command line."""

  gone: float
  start: float
  silence: float
  hangs: float


def make_data(folder: pathlib.Path, classes: Sequence[str] = ("cat", "dog")) -> pathlib.Path:
  """Write small images of some classes, each in a colour of its own with noise."""
  rng = np.random.default_rng(len(classes))
  for split, count in (("train", 20), ("val", 8)):
    for label, name in enumerate(classes):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 60, (20, 20, 3)) + 60 * np.eye(3, dtype=int)[label % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
  return folder


def start(
  workdir: pathlib.Path,
  data: pathlib.Path,
  hosts: int,
  total_steps: int,
  limits: Limits,
  workers: int = 0,
) -> LocalPod:
  """Start all hosts, each with so many decoding processes."""
  command = trainer(
    workdir,
    "data.kind=folder",
    f"data.path={data}",
    f"data.workers={workers}",
    f"data.worker_timeout_seconds={limits.hangs}",
    f"data.stream_give_up_seconds={limits.hangs}",
    "data.threads=0",
    "model.num_classes=2",
    f"total_steps={total_steps}",
    f"log.every_steps={EVERY}",
    "checkpoint.keep_last=100000",
    f"checkpoint.every_steps={EVERY}",
    f"pod.timeout_seconds={limits.silence}",
    f"pod.start_seconds={limits.start}",
  )
  return LocalPod(hosts, 1, command, grace=limits.gone)


def finish(pod: LocalPod, limit: float) -> dict[int, int]:
  """Return the exit code of each host when all are gone, and make sure that they are."""
  pod.finish(limit)
  pod.close()
  return pod.codes()


def checkpoints(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  return (
    sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    if folder.exists()
    else []
  )


def damage(workdir: pathlib.Path, step: int, rng: random.Random) -> str:
  """Damage a checkpoint in one of the ways that disks and killed processes do."""
  folder = workdir / "checkpoints" / str(step)
  data = max(
    (folder / "params").rglob("d/*"),  # values; a restore does without some of the other files
    key=lambda path: path.stat().st_size,
  )
  kind = rng.choice(["lost item", "cut file", "wrong byte"])
  if kind == "lost item":
    shutil.rmtree(folder / "opt_state")
  elif kind == "cut file":
    os.truncate(data, data.stat().st_size // 2)
  else:
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x10
    data.write_bytes(content)
  return kind


def damage_file(workdir: pathlib.Path, rng: random.Random) -> tuple[str, bool]:
  """Damage a small file as a host does that loses power; return what, and whether it is said."""
  name = rng.choice(SMALL)
  path = workdir / name
  whole = path.read_bytes() if path.exists() else b'{"top1": 0.5, "step": 3}'
  kind, content = rng.choice(
    [("empty", b""), ("cut", whole[: len(whole) // 2]), ("zeros", bytes(len(whole)))]
  )
  path.write_bytes(content)
  return f"{kind} {name}", name == "starts.json"


def strike_worker(pod: LocalPod, victim: int, rng: random.Random) -> str:
  """Kill or suspend a decoding process of a host."""
  children = psutil.Process(pod.pids()[victim]).children()
  workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
  assert workers, f"host {victim} has no decoding process"
  how = rng.choice((signal.SIGKILL, signal.SIGSTOP))
  rng.choice(sorted(workers, key=lambda worker: worker.pid)).send_signal(how)
  return how.name


def refused(pod: LocalPod, code: int, words: str, limits: Limits) -> None:
  """Make sure that every host of a start ends with this code and these words."""
  codes = set(finish(pod, limits.start).values())
  assert codes == {code} and words in pod.log, f"{codes}\n{pod.log[-3000:]}"


def chaos(
  folder: pathlib.Path,
  events: list[str],
  seed: int,
  counts: Sequence[int] = HOSTS,
  patience: float = 1.0,
) -> None:
  """Train through the events and check everything.

  Args:
    folder: folder of the run and of the runs it is compared with.
    events: names from EVENTS, in order.
    seed: seed of the moment and the host of each event.
    counts: numbers of hosts to choose from; the run starts with the first.
    patience: factor of all time limits.

  Raises:
    AssertionError: with what went wrong.
  """
  # Under nohup it is ignored, and so it would be in what is started here.
  signal.signal(signal.SIGHUP, lambda *unused: None)
  rng, workdir, total = random.Random(seed), folder / "run", STEPS_PER_EVENT * (len(events) + 2)
  limits = Limits(LIMIT * patience, START * patience, SILENCE * patience, HANGS * patience)
  data, others = make_data(folder / "data"), make_data(folder / "others", ("cat", "fox"))
  hosts, newest, harmed, unread = counts[0], 0, None, False
  stretches = []  # (hosts, first step, {step: fingerprints})
  for number, event in enumerate([*events, "end"]):
    began = time.monotonic()
    before = newest
    pod = start(workdir, data, hosts, total, limits, workers=int(event == "worker"))
    struck, detail = began, ""
    try:
      pod.wait_for(r"step \d+/\d+ ", limits.start)
      came = time.monotonic() - began
      if before:
        assert f"Resuming from checkpoint {before} of" in pod.log, (
          f"not from {before}:\n{pod.log[-3000:]}"
        )
      said = re.search(r"Checkpoint \S+ is damaged", pod.log)
      assert bool(said) == bool(harmed), pod.log[-3000:]
      assert ("starts.json is damaged" in pod.log) == unread, pod.log[-3000:]
      # All are whole again, and no start is lost, whatever was damaged.
      written = {name: json.loads((workdir / name).read_text()) for name in WRITTEN}
      assert written["starts.json"]["starts"] == number + 1
      assert written["classes.json"] == {"classes": ["cat", "dog"]}
      if event != "end":
        pod.wait_for(f"step {EVERY * (before // EVERY + rng.randint(2, 4))}/", limits.start)
        time.sleep(rng.uniform(0.0, 0.5))
        assert f"step {total}/" not in pod.log, "the run was over before the event"
      struck, victim = time.monotonic(), rng.randrange(hosts)
      if event == "SIGKILL" or event == "SIGSTOP":
        os.kill(pod.pids()[victim], getattr(signal, event))
        if event == "SIGSTOP":
          for other in set(range(hosts)) - {victim}:
            pod.wait_for(rf"\[{other}\] ended with", limits.gone)
          os.kill(pod.pids()[victim], signal.SIGKILL)
        codes = finish(pod, limits.gone)
        assert codes.pop(victim) == -signal.SIGKILL and set(codes.values()) <= {76}, (
          f"{codes}\n{pod.log[-3000:]}"
        )
      elif event != "end":
        if event == "worker":
          detail = strike_worker(pod, victim, rng)
          pod.wait_for(r"A decoding process 0 .* It is replaced", limits.start)
        elif event == "owner":
          second = start(workdir, data, 1, total, limits)
          refused(second, 76, "is in use by process", limits)
          detail = "refused"
        if event in ("worker", "owner"):  # and the run is not disturbed
          last = max(map(int, re.findall(r"step (\d+)/", pod.log)))
          pod.wait_for(f"step {last + EVERY}/", limits.start)
        struck = time.monotonic()
        os.kill(pod.pids()[victim], signal.SIGHUP if event == "SIGHUP" else signal.SIGTERM)
        assert set(finish(pod, limits.gone).values()) == {75}, pod.log[-3000:]
      else:
        codes = set(finish(pod, limits.gone + 0.5 * total * patience).values())
        assert codes == {0}, pod.log[-3000:]
    except BaseException:
      pod.close()
      raise
    gone = time.monotonic() - struck
    if not stretches or stretches[-1][0] != hosts:
      stretches.append((hosts, before, {}))
    steps = [step for step in checkpoints(workdir) if step > before]
    stretches[-1][2].update({step: fingerprints(workdir, step) for step in steps})
    reached = max(map(int, re.findall(r"step (\d+)/", pod.log)))
    newest = max(checkpoints(workdir))
    if event in ("SIGKILL", "SIGSTOP"):
      # A step is logged before its save begins, and a save begins when the one before is whole. So
      # this save and the one before it may be lost, and no more.
      kept = max(before, EVERY * (reached // EVERY - 2))
      assert newest >= kept, f"step {reached} was reached, but {newest} is the newest checkpoint"
    elif event != "end":
      assert f"Stopped and saved at step {newest} of" in pod.log, (
        f"{newest} is the newest checkpoint:\n{pod.log[-3000:]}"
      )
    else:
      assert newest == total
    harmed, unread = None, False
    note = f"{detail} host {victim} of {hosts}".strip() if event != "end" else f"{hosts} hosts"
    if event == "damage":
      note = f"{damage(workdir, newest, rng)} of checkpoint {newest}"
      harmed, newest = newest, checkpoints(workdir)[-2]
      stretches[-1][2].pop(harmed, None)
    elif event == "files":
      note, unread = damage_file(workdir, rng)
    elif event == "data":
      data.rename(folder / "own")
      others.rename(data)
      words = "holds checkpoints of a run on other data"
      refused(start(workdir, data, hosts, total, limits), 2, words, limits)
      data.rename(others)
      (folder / "own").rename(data)
      note = "others were refused"
    elif event == "resize":
      note = (
        f"{hosts} -> {(hosts := rng.choice([count for count in counts if count != hosts]))} hosts"
      )
    print(
      f"{number + 1:3} {event:8} {note:32} start {came:5.1f} s, gone after {gone:4.1f} s, "
      f"step {reached}, checkpoint {newest}",
      flush=True,
    )

  final = json.loads((workdir / "final.json").read_text())
  assert final["step"] == total
  for number, (hosts, first, seen) in enumerate(stretches):
    periodic = [step for step in seen if step % EVERY == 0]
    if not periodic:
      continue
    quiet = folder / f"quiet-{number}"
    if first:
      shutil.copytree(workdir / "checkpoints" / str(first), quiet / "checkpoints" / str(first))
    pod = start(quiet, data, hosts, total, limits)
    while not (quiet / "checkpoints" / str(max(periodic))).exists() and not pod.ended:
      time.sleep(0.2)
    pod.close()
    for step in periodic:
      assert fingerprints(quiet, step) == seen[step], (
        f"checkpoint {step} on {hosts} hosts is not that of a quiet run"
      )
    print(
      f"{hosts} hosts, steps {first} to {max(periodic)}: {len(periodic)} checkpoints are those of "
      "a quiet run, bit for bit",
      flush=True,
    )
    shutil.rmtree(quiet)
  print(f"{len(events)} events, {total} steps, top1 {100 * final['top1']:.1f} %; nothing was lost.")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--events", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--folder", type=pathlib.Path, help="folder of the runs, kept (default: a temporary one)"
  )
  parser.add_argument("--patience", type=float, default=1.0, help="factor of all time limits")
  args = parser.parse_args()
  rng = random.Random(args.seed)
  events = [rng.choice(EVENTS) for _ in range(args.events)]
  with contextlib.ExitStack() as stack:
    folder = args.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    chaos(folder, events, args.seed, patience=args.patience)


if __name__ == "__main__":
  main()
