"""A stand-in for gcloud: a folder is the cloud, whose files a test reads and changes.

CLOUD/objects/BUCKET/...    objects; the generation of one is the mtime of its file, in ns
CLOUD/queued.json           name -> queued resource; CLOUD/grant is the state of a new one (ACTIVE)
CLOUD/nodes.json            name -> node, made with the queued resource when that is ACTIVE
CLOUD/hosts/0-1             home of worker 1 of slice 0; `down` beside it: does not answer
CLOUD/refuse.json           [[words of a line, how often, message]]: lines that fail, or answer
                            with what follows PRINT
CLOUD/log                   every line, shell-quoted
"""

import contextlib
import fnmatch
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
ACCOUNT = "7-compute@developer.gserviceaccount.com"


def load(name, default):
  path = CLOUD / name
  return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
  partial = CLOUD / f"{name}.{os.getpid()}"
  partial.write_text(json.dumps(value))
  partial.replace(CLOUD / name)


def fail(message):
  sys.exit(f"ERROR: (gcloud) {message}")


def path_of(url):
  return CLOUD / "objects" / url.removeprefix("gs://").split("#")[0]


def storage(words, flags):
  if words[0] == "cp":
    source, target = (
      path_of(word) if word.startswith("gs://") else pathlib.Path(word) for word in words[1:]
    )
    wanted = flags.get("if-generation-match")
    if wanted is not None and wanted != (
      str(target.stat().st_mtime_ns) if target.exists() else "0"
    ):
      fail("HTTPError 412: At least one of the pre-conditions you specified did not hold.")
    if not source.exists():
      fail("The following URLs matched no objects or files")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)
    print(f"Created: {words[2]}#{target.stat().st_mtime_ns}", file=sys.stderr)
    return
  url = words[-1]
  root = CLOUD / "objects"
  found = sorted(
    path
    for path in root.rglob("*")
    if path.is_file()
    and path.suffix != ".partial"
    and fnmatch.fnmatch(str(path), str(path_of(url)))
  )
  if not found:
    fail("The following URLs matched no objects or files")
  for path in found:
    if words[0] == "objects":
      print(json.dumps({"generation": str(path.stat().st_mtime_ns)}))
    elif words[0] == "cat":
      print(path.read_text(), end="")
    else:
      print(f"gs://{path.relative_to(root)}")


def environment_of(number, worker):
  """Returns the environment of a host's processes, and makes its home."""
  home = CLOUD / "hosts" / f"{number}-{worker}"
  home.mkdir(parents=True, exist_ok=True)
  return dict(
    os.environ,
    HOME=str(home),
    TPU_STATE=str(home / "state"),
    TPU_WORKER_ID=str(worker),
    MEGASCALE_SLICE_ID=str(number),
    GCE_METADATA_HOST="localhost:9",
    TPU_FAKE_BOOT=(CLOUD / "booted").read_text(),
  )


def boot(script, slices, hosts):
  """Runs the startup script of a new slice on all its hosts."""
  (CLOUD / "booted").write_text(str(time.clock_gettime(time.CLOCK_BOOTTIME)))
  for number in range(slices):
    for worker in range(hosts):
      subprocess.run(["sh", script], env=environment_of(number, worker), check=True, cwd="/")


def end_hosts():
  """Ends all processes of hosts, this one last, and leaves their folders to the next machines."""
  for state in (CLOUD / "hosts").glob("*/state"):
    state.rename(state.with_name(f"lost-{time.time_ns()}"))
  found = True
  while found:  # until a pass finds none: they may start others meanwhile
    found = False
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      with contextlib.suppress(OSError):
        mine = f"HOME={CLOUD}/hosts/".encode() in path.read_bytes()
        if mine and path.parent.name != str(os.getpid()):
          os.kill(int(path.parent.name), signal.SIGKILL)
          found = True


def ssh(flags):
  nodes, hosts = load("nodes.json", {}), []
  held = [
    node for name, node in nodes.items() if not name.endswith("-7")
  ]  # of an earlier life, see test_life
  for number, node in enumerate(held):
    hosts += [
      (number, worker)
      for worker in range(len(node["networkEndpoints"]))
      if flags["node"] in ("all", str(number)) and flags["worker"] in ("all", str(worker))
    ]
  running = []
  for number, worker in hosts:
    environment = environment_of(number, worker)
    if not (CLOUD / "hosts" / f"{number}-{worker}.down").exists():
      running.append(
        subprocess.Popen(
          ["bash", "-c", flags["command"]],
          cwd=environment["HOME"],
          stdin=subprocess.DEVNULL,
          env=environment,
        )
      )
  codes = [process.wait() for process in running]
  if len(running) < len(hosts) or any(codes):
    fail("Could not SSH into the instance.")


def make_nodes(names, labels):
  """Makes the slices of a request, and boots their hosts."""
  nodes, hosts = load("nodes.json", {}), int(os.environ.get("FAKE_HOSTS", "2"))
  for name in names:
    nodes[name] = {
      "name": f"projects/p/locations/z/nodes/{name}",
      "state": "READY",
      "health": "HEALTHY",
      "labels": labels,
      "networkEndpoints": [{}] * hosts,
    }
  save("nodes.json", nodes)
  boot(CLOUD / "boot.sh", len(names), hosts)


def tpus(kind, verb, name, flags):
  queued, nodes = load("queued.json", {}), load("nodes.json", {})
  if verb == "create":
    if name in queued:
      fail("ALREADY_EXISTS: Resource already exists")
    labels = dict(pair.split("=") for pair in flags["labels"].split(","))
    grant = CLOUD / "grant"
    state = grant.read_text().strip() if grant.exists() else "ACTIVE"
    spec = {"node": {"labels": labels, "acceleratorType": flags["accelerator-type"]}}
    queued[name] = {
      "name": f"projects/p/locations/z/queuedResources/{name}",
      "state": {"state": state},
      "tpu": {"nodeSpec": [spec]},
    }
    shutil.copyfile(flags["metadata-from-file"].split("=", 1)[1], CLOUD / "boot.sh")
    count, prefix = int(flags.get("node-count", 1)), flags.get("node-prefix", name)
    names = [flags.get("node-id", f"{prefix}-{i}") for i in range(count)]
    save("request.json", [names, labels])
    save("queued.json", queued)
    if state == "ACTIVE":
      make_nodes(names, labels)
    return
  if verb == "describe":
    print(json.dumps(queued[name]) if name in queued else fail("NOT_FOUND: no such resource"))
    return
  if verb == "list":
    print(json.dumps(list((queued if kind == "queued-resources" else nodes).values())))
    return
  if verb == "delete":
    (queued if kind == "queued-resources" else nodes).pop(name, None) or fail(
      "NOT_FOUND: no such resource"
    )
    if kind == "queued-resources":
      save("queued.json", queued)
      save("nodes.json", {})
      end_hosts()
      return
  save("queued.json", queued)
  save("nodes.json", nodes)


def main():
  line = shlex.join(["gcloud", *sys.argv[1:]])
  with open(CLOUD / "log", "a") as log:
    log.write(line + "\n")
  refusals = load("refuse.json", [])
  for entry in refusals:
    if entry[0] in line and entry[1]:
      entry[1] -= 1
      save("refuse.json", refusals)
      if entry[2].startswith("PRINT "):
        print(entry[2].removeprefix("PRINT "))
        return
      fail(entry[2])
  words = [word for word in sys.argv[1:] if not word.startswith("--")]
  flags = dict(
    word[2:].split("=", 1) if "=" in word else (word[2:], "")
    for word in sys.argv[1:]
    if word.startswith("--")
  )
  if words[0] == "grant":  # not a verb of gcloud: a request leaves the queue
    settings = load("request.json", None)
    make_nodes(*settings)
  elif words[0] == "reboot":
    boot(CLOUD / "boot.sh", 1, int(os.environ.get("FAKE_HOSTS", "2")))
  elif "scp" in words:
    for home in (CLOUD / "hosts").glob("?-?"):
      shutil.copyfile(words[-2], home / words[-1].split(":")[1])
  elif words[0] == "storage":
    storage(words[1:], flags)
  elif words[:2] == ["compute", "tpus"] and words[3] == "ssh":
    ssh(flags)
  elif words[:2] == ["compute", "tpus"]:
    tpus(words[2], words[3], words[4] if len(words) > 4 else None, flags)
  else:
    editor = {"role": "roles/editor", "members": [f"serviceAccount:{ACCOUNT}"]}
    answers = {"version": {}, "describe": {"projectNumber": "7"}, "policy": {"bindings": [editor]}}
    word = next((word for word in words if word in answers), "")
    word = "policy" if words[:2] == ["projects", "get-iam-policy"] else word
    print(json.dumps(answers.get(word, [])))


main()
