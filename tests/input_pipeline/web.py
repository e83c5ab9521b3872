"""A web server of a folder that behaves like a network.

    python -m tests.input_pipeline.web FOLDER [--port N] [--delay S]

It answers ranged requests for http://HOST/FILE and, as Google Cloud Storage does, for
gs://bucket/FILE. `faults` makes a share of them fail.
"""

import argparse
import collections
import hashlib
import http.server
import json
import os
import pathlib
import random
import re
import socket
import struct
import threading
import time
import urllib.parse


class Server(http.server.ThreadingHTTPServer):
  """Serves a folder.

  Attributes:
    url: for http:// reads.
    faults: share of requests by kind: reset (connection broken), refuse (503 or 429), slow
      (answered after `slow_seconds`), short (half of the answer).
    delay: seconds before each answer.
    counts: requests, bytes, and faults by kind.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, folder: pathlib.Path, port: int = 0, delay: float = 0.0):
    super().__init__(("127.0.0.1", port), _Handler)
    self.folder, self.delay = pathlib.Path(folder), delay
    self.url = f"http://127.0.0.1:{self.server_address[1]}"
    self.faults, self.slow_seconds = {}, 1.0
    self.random, self.lock = random.Random(0), threading.Lock()
    self.counts = collections.Counter()

  def __enter__(self):
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *unused):
    self.shutdown()
    self.server_close()

  def environment(self) -> dict[str, str]:
    """What makes TensorStore and array_record take this server for Google's."""
    return {
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
    }

  def draw_fault(self) -> str | None:
    """Return what is to go wrong with a request."""
    with self.lock:
      self.counts["requests"] += 1
      drawn = self.random.random()
      for kind, share in self.faults.items():
        drawn -= share
        if drawn < 0:
          self.counts[kind] += 1
          return kind
    return None

  def handle_error(self, request, client_address):
    """Clients hang up, and the test says so if it minds."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *unused):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = urllib.parse.urlsplit(self.path)
    if path.path == "/counts":
      self._answer(200, json.dumps(self.server.counts).encode())
      return
    found = re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o(?:/(.+))?", path.path)
    if found and not found[1]:
      names = [{"name": name} for name in sorted(os.listdir(self.server.folder))]
      self._answer(200, json.dumps({"items": names}).encode())
      return
    name = urllib.parse.unquote(found[1] if found else path.path[1:])
    fault = self.server.draw_fault()
    time.sleep(self.server.slow_seconds if fault == "slow" else self.server.delay)
    if fault == "reset":
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      self.rfile.close()
      self.wfile.close()
      os.close(self.connection.detach())
      self.close_connection = True
      return
    if fault == "refuse":
      self._answer(self.server.random.choice((429, 503)), b"")
      return
    file = self.server.folder / name
    if not file.is_file():
      self._answer(404, b"")
      return
    size = file.stat().st_size
    range_ = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    first, last = range_.groups() if range_ else ("0", "")
    start = int(first) if first else max(0, size - int(last))
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size:
      self._answer(416, b"")
      return
    with open(file, "rb") as f:
      f.seek(start)
      data = f.read(stop - start)
    generation = int(hashlib.sha256(str(file.stat().st_mtime_ns).encode()).hexdigest()[:12], 16)
    headers = {"ETag": f'"{generation}"', "x-goog-generation": generation}
    if range_:
      headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    self._answer(206 if range_ else 200, data, headers, short=fault == "short")

  def _answer(self, status, body, headers=(), short=False):
    self.send_response(status)
    for key, value in dict(headers).items():
      self.send_header(key, str(value))
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command == "HEAD":
      return
    self.wfile.write(body[: len(body) // 2] if short else body)
    self.close_connection = short
    with self.server.lock:
      self.server.counts["bytes"] += len(body)


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--port", type=int, default=0)
  parser.add_argument("--delay", type=float, default=0.0)
  args = parser.parse_args()
  server = Server(args.folder, args.port, args.delay)
  print(server.url, flush=True)
  server.serve_forever()
