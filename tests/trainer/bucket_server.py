"""A server of Google Cloud Storage on loopback that fails on demand.

    python -m tests.trainer.bucket_server PORT FAULTS REFUSED

It is gcp-storage-emulator with a bucket `bucket`, and with what TensorStore and gcsfs need besides.
FAULTS is a JSON file, read at each request: while it has a `status`, each request whose method and
path match `match` is answered with that status, and noted as a line of the file REFUSED.
"""

import contextlib
from http import HTTPStatus
import json
import pathlib
import re
import subprocess
import sys
import time

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
import requests

from tests.trainer.shared import free_port


def _generation(storage, request):
  with contextlib.suppress(NotFound):
    return storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])[
      "generation"
    ]
  return "0"


def _download(request, response, storage):
  """Download with the generation, which TensorStore needs and the emulator leaves out."""
  objects.download(request, response, storage)
  response["X-Goog-Generation"] = _generation(storage, request)


def _insert(request, response, storage):
  """Insert on the condition by which TensorStore and gcloud replace an object."""
  wanted = request.query.get("ifGenerationMatch")
  if wanted:
    # gcloud sends the name in the body.
    name = request.query.get("name") or [request.data.get("meta", request.data)["name"]]
    request.params["object_id"] = name[0]
  if wanted and wanted[0] != _generation(storage, request):
    response.status = HTTPStatus.PRECONDITION_FAILED
    response.json(
      {
        "error": {
          "code": 412,
          "message": "At least one of the pre-conditions you specified did not hold.",
        }
      }
    )
    return
  objects.insert(request, response, storage)


def _move(request, response, storage):
  """Move an object, which gcsfs renames by and the emulator lacks."""
  request.params["dest_bucket_name"] = request.params["bucket_name"]
  objects.copy(request, response, storage)
  if response.status == HTTPStatus.OK:
    objects.delete(request, response, storage)


def _layout(request, response, storage):
  """Answer gcloud, which asks for managed folders before it lists a bucket or removes folders."""
  response.json({"hierarchicalNamespace": {"enabled": False}, "items": []})


_BUCKET, _OBJECT = r"/b/(?P<bucket_name>[-.\w]+)/o", r"/(?P<object_id>.*[^/]+)"
server.HANDLERS = (
  (rf"^/storage/v1{_BUCKET}{_OBJECT}/moveTo/o/(?P<dest_object_id>.*[^/]+)$", {"POST": _move}),
  (r"^/storage/v1/b/[-.\w]+/(storageLayout|managedFolders)$", {"GET": _layout}),
  (
    rf"^(/resumable)?/upload/storage/v1{_BUCKET}$",
    {"POST": _insert, "PUT": objects.upload_partial},
  ),
  (rf"^/download/storage/v1{_BUCKET}{_OBJECT}$", {"GET": _download}),
  (
    rf"^/storage/v1{_BUCKET}{_OBJECT}$",
    {
      "GET": lambda request, response, storage: (
        _download if request.query.get("alt") == ["media"] else objects.get
      )(request, response, storage),
      "DELETE": objects.delete,
      "PATCH": objects.patch,
    },
  ),
  *server.HANDLERS,
)


class _Handler(server.RequestHandler):
  wbufsize = (
    -1
  )  # headers and body in one packet, for the second would wait for the client's word on the first
  faults: pathlib.Path
  refused: pathlib.Path

  def parse_request(self):
    if not super().parse_request():
      return False
    if self.headers.get("Content-Type", "").startswith(
      "multipart/"
    ):  # gcloud's boundary is in the wrong quotes
      self.headers.replace_header("Content-Type", self.headers["Content-Type"].replace("'", '"'))
    faults = json.loads(self.faults.read_text())
    line = f"{self.command} {self.path}"
    if not faults or not re.search(faults["match"], line):
      return True
    self.rfile.read(int(self.headers.get("Content-Length", 0)))
    with self.refused.open("a") as file:
      file.write(line + "\n")
    body = json.dumps(
      {"error": {"code": faults["status"], "message": "refused by the test"}}
    ).encode()
    self.send_response(faults["status"])
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
    return False

  def handle(self):
    with contextlib.suppress(ConnectionError):  # of clients that were killed
      super().handle()


class Server:
  """The process of a bucket `bucket`."""

  def __init__(self, folder):
    port = free_port()
    self._faults, self._refused = folder / "faults.json", folder / "refused"
    self.answer()
    self.process = subprocess.Popen(
      [sys.executable, "-m", "tests.trainer.bucket_server", str(port), self._faults, self._refused],
      cwd=pathlib.Path(__file__).parents[2],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    self.url = f"http://127.0.0.1:{port}"
    self.environment = {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    }
    while True:
      with contextlib.suppress(requests.ConnectionError):
        requests.get(self.url, timeout=10)
        return
      assert self.process.poll() is None
      time.sleep(0.05)

  def refuse(self, match, status):
    """Refuses what matches from now on."""
    self._refused.write_text("")
    self._set({"match": match, "status": status})

  def answer(self):
    self._set({})

  def _set(self, faults):
    partial = self._faults.with_suffix(".tmp")
    partial.write_text(json.dumps(faults))
    partial.replace(self._faults)

  def refused(self):
    return self._refused.read_text().splitlines()


@contextlib.contextmanager
def serving(folder):
  server = Server(folder)
  try:
    yield server
  finally:
    server.process.kill()
    server.process.wait()


if __name__ == "__main__":
  _Handler.faults, _Handler.refused = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
  server.RequestHandler = _Handler
  server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
