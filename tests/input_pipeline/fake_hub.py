"""Stands for the Hugging Face hub, or for any web server: python fake_hub.py PORT FOLDER TOKEN LOG

FOLDER/OWNER/NAME is the data set OWNER/NAME, visible only with TOKEN. Its files are served like
those of the hub, after a redirect to a signed URL. FOLDER itself is listed under /files/ without a
token. A file FOLDER/fail with a number makes that many ranged requests fail. Each request is a line
of LOG.
"""

import contextlib
import hashlib
from http import server
import json
import pathlib
import re
import sys
from urllib import parse

_REVISION = "0123456789abcdef0123456789abcdef01234567"


class Handler(server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  root: pathlib.Path
  token: str
  log: pathlib.Path

  def log_message(self, *unused):
    pass

  def handle(self):
    with contextlib.suppress(ConnectionError):
      super().handle()

  def do_HEAD(self):
    self._answer()

  def do_GET(self):
    self._answer()

  def do_POST(self):
    self._body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
    self._answer()

  def _answer(self):
    url = parse.urlsplit(self.path)
    path = parse.unquote(url.path)
    with self.log.open("a") as f:
      f.write(f"{self.command} {path} {self.headers.get('Range', '')}\n")
    if path.startswith("/files/"):
      return self._file(self.root / path.removeprefix("/files/"))
    if path.startswith("/signed/"):
      return self._file(self.root / path.removeprefix("/signed/"))
    if self.headers.get("Authorization") != f"Bearer {self.token}":
      return self._send(
        401, b"Access to this data set is restricted.", {"X-Error-Code": "GatedRepo"}
      )
    if found := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/[^/]+/(.*)", path):
      if (self.root / found[1] / found[2]).is_file():
        size = (self.root / found[1] / found[2]).stat().st_size
        return self._send(
          302,
          b"",
          {
            "Location": f"/signed/{found[1]}/{found[2]}?Signature=sesame",
            "X-Repo-Commit": _REVISION,
            "X-Linked-Size": str(size),
            "X-Linked-Etag": '"e"',
            "ETag": '"e"',
          },
        )
      return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
    if found := re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/(.*))?", path):
      name, rest = found.groups()
      folder = self.root / name
      if not folder.is_dir():
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
      if rest is None or rest.startswith("revision/"):
        return self._json(
          {
            "id": name,
            "sha": _REVISION,
            "private": False,
            "gated": "auto",
            "siblings": [
              {"rfilename": str(f.relative_to(folder))}
              for f in sorted(folder.rglob("*"))
              if f.is_file()
            ],
          }
        )
      if rest.startswith("tree/"):
        under = folder / rest.split("/", 2)[2] if rest.count("/") > 1 else folder
        every = (
          under.rglob("*")
          if "recursive=True" in url.query or "recursive=true" in url.query
          else under.glob("*")
        )
        return self._json([_entry(f, folder) for f in sorted(every)])
      if rest.startswith("paths-info/"):
        wanted = self._body["paths"]
        return self._json([_entry(folder / p, folder) for p in wanted if (folder / p).exists()])
    return self._send(404, b"")

  def _file(self, path):
    if path.is_dir():
      names = "".join(f'<a href="{f.name}{"/" * f.is_dir()}">x</a>' for f in sorted(path.iterdir()))
      return self._send(200, names.encode(), {"Content-Type": "text/html"})
    if not path.is_file():
      return self._send(404, b"")
    data, status, headers = path.read_bytes(), 200, {"Accept-Ranges": "bytes"}
    if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      if self._fails():
        return self._send(503, b"busy")
      size = len(data)
      start, end = (
        (int(found[1]), int(found[2] or size - 1)) if found[1] else (size - int(found[2]), size - 1)
      )
      headers["Content-Range"] = f"bytes {start}-{min(end, size - 1)}/{size}"
      data, status = data[start : end + 1], 206
    return self._send(status, data, headers)

  def _fails(self):
    file = self.root / "fail"
    left = int(file.read_text()) if file.exists() else 0
    if left:
      file.write_text(str(left - 1))
    return left > 0

  def _json(self, value):
    self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

  def _send(self, status, body, headers=()):
    self.send_response(status)
    for key, value in dict(headers).items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)


def _entry(path, folder):
  name = str(path.relative_to(folder))
  kind = "directory" if path.is_dir() else "file"
  return {
    "type": kind,
    "path": name,
    "oid": hashlib.sha1(name.encode()).hexdigest(),
    "size": 0 if path.is_dir() else path.stat().st_size,
  }


if __name__ == "__main__":
  Handler.root, Handler.token, Handler.log = (
    pathlib.Path(sys.argv[2]),
    sys.argv[3],
    pathlib.Path(sys.argv[4]),
  )
  server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
