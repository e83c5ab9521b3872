"""The small files of a workdir: whole, absent, or refused with one sentence."""

import errno
import itertools
import json
import os
import threading

import aiohttp
from etils import epath
from google.api_core import exceptions
import pytest
import requests

from configs import base
from trainer.errors import FAILED, HOST_LOST, StorageError, TrainerError
from trainer.pod.pod import Pod
from trainer.workdir import files, storage

# Only now, since the product chooses what is imported by it.
gcsfs_retry = pytest.importorskip("gcsfs.retry")


def test_json_comes_back_and_absent_is_none(tmp_path):
  path = epath.Path(tmp_path) / "final.json"
  assert files.read_json(path) is None
  files.write_json(path, {"top1": 0.5, "best": None})
  assert files.read_json(path) == {"top1": 0.5, "best": None}
  assert [p.name for p in tmp_path.iterdir()] == ["final.json"]


def test_a_file_that_is_cut_off_is_named_and_set_aside(tmp_path, caplog):
  path = epath.Path(tmp_path) / "starts.json"
  path.write_text('{"first_start": 17')
  assert files.read_json(path) is None and path.exists()
  assert files.read_json(path, set_aside=True) is None and not path.exists()
  assert caplog.text.count("starts.json is damaged (") == 2
  assert (tmp_path / "starts.json.damaged").read_text() == '{"first_start": 17'


def test_a_file_is_no_workdir(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(StorageError, match=r"cannot be written by host 0 \(it is a file\); mend"):
    files.open_workdir(str(tmp_path / "run"), Pod(base.get_config().pod))


def test_what_cannot_be_read_or_written_is_named(tmp_path):
  (tmp_path / "final.json").mkdir()
  with pytest.raises(StorageError, match=r"final\.json could not be read .*same command again"):
    files.read_json(epath.Path(tmp_path) / "final.json")
  with pytest.raises(StorageError, match=r"final\.json could not be written .*same command again"):
    files.write_json(epath.Path(tmp_path) / "final.json", {})


def _gcsfs(status):
  with pytest.raises(Exception) as raised:
    gcsfs_retry.validate_response(status, b'{"error": {"code": %d}}' % status, "bucket/x")
  return raised.value


def _wrapped(error):
  outer = Exception("Failed to write array")
  outer.__cause__ = error
  return outer


# What errors of storage look like, as their libraries raise them.
REFUSALS = [
  *[OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EEXIST)],
  *[OSError(n, os.strerror(n)) for n in (errno.EDQUOT, errno.EFBIG, errno.EMFILE)],
  *[_gcsfs(status) for status in (401, 403, 404)],
  exceptions.Forbidden("no"),
  exceptions.NotFound("no"),
  ValueError("PERMISSION_DENIED: Error writing object"),
  ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left [os_error_code='28']"),
  ValueError("UNKNOWN: Error writing local file: File too large [os_error_code='27']"),
  _wrapped(ValueError("PERMISSION_DENIED: Error writing object")),
]
SILENCES = [
  *[OSError(n, os.strerror(n)) for n in (errno.EIO, errno.ETIMEDOUT, errno.ESTALE)],
  *[_gcsfs(status) for status in (429, 500, 502, 503)],
  exceptions.ServiceUnavailable("busy"),
  exceptions.TooManyRequests("busy"),
  ValueError("UNAVAILABLE: CURL error"),
  ValueError("DEADLINE_EXCEEDED: HTTP response code: 504"),
  ConnectionResetError(errno.ECONNRESET, "reset"),
  TimeoutError(),
  requests.ConnectionError("no route"),
  aiohttp.ServerDisconnectedError(),
  _wrapped(ValueError("UNAVAILABLE: CURL error")),
]


@pytest.mark.parametrize(
  "error, code", [*[(e, FAILED) for e in REFUSALS], *[(e, HOST_LOST) for e in SILENCES]], ids=repr
)
def test_a_rerun_mends_a_storage_that_was_silent_and_not_one_that_refused(error, code):
  assert storage.failed("x could not be written", error).exit_code == code


@pytest.mark.parametrize(
  "error, remedy",
  [
    (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    (_wrapped(ValueError("UNKNOWN: File too large [os_error_code='27']")), "ulimit -f"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
  ],
)
def test_a_limit_of_the_process_is_said_with_what_raises_it(error, remedy):
  said = str(storage.failed("x could not be written", error))
  assert remedy in said and said.endswith("mend that, then run the same command again.")


def test_starts_at_the_same_time_do_not_disturb_each_other(tmp_path):
  """The workdir has an owner only after this: each start reads what it has written itself."""
  failed, together = [], threading.Barrier(4)

  def start():
    together.wait()
    for _ in range(50):
      try:
        files.open_workdir(str(tmp_path), Pod(base.get_config().pod))
      except TrainerError as error:
        failed.append(str(error))

  threads = [threading.Thread(target=start) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failed and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("server")
def test_a_small_file_that_is_replaced_while_it_is_read_is_whole(caplog):
  """As owner.json is, of which only the time of its renewal changes, and its length with it."""
  path, done = storage.path_of("gs://bucket/files") / "owner.json", threading.Event()
  storage.write_whole(path, "{}")

  def replace():
    for number in itertools.count():
      storage.write_whole(path, json.dumps({"renewed": "1" * (1 + 40 * (number % 2))}))
      if done.is_set():
        return

  writer = threading.Thread(target=replace)
  writer.start()
  try:
    for _ in range(50):
      assert files.read_json(path) is not None, caplog.text
  finally:
    done.set()
    writer.join()
