"""The small files of a workdir: whole, absent, or refused with one sentence."""

from etils import epath
import pytest

from configs import base
from trainer.errors import ConfigError, StorageError
from trainer.pod.pod import Pod
from trainer.workdir import files


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
  with pytest.raises(ConfigError, match=r"run cannot be written by host 0: it is a file\."):
    files.open_workdir(str(tmp_path / "run"), Pod(base.get_config().pod))


def test_what_cannot_be_read_or_written_is_named(tmp_path):
  (tmp_path / "final.json").mkdir()
  with pytest.raises(StorageError, match=r"final\.json could not be read .*same command again"):
    files.read_json(epath.Path(tmp_path) / "final.json")
  with pytest.raises(StorageError, match=r"final\.json could not be written .*same command again"):
    files.write_json(epath.Path(tmp_path) / "final.json", {})
