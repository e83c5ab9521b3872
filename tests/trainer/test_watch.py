"""The screen of a run elsewhere: before it begins, under way, stopped, failed, complete."""

import json
import signal
import subprocess
import sys
import time

import pytest

from configs import base
from input_pipeline.remote import fsspec as remote
from trainer.errors import DONE, StorageError
from trainer.reporting import json_lines, recorded, watch
from trainer.workdir import storage

FINAL = {
  "step": 40,
  "epochs": 2.0,
  "top1": 0.5,
  "top5": 0.9,
  "loss": 1.0,
  "examples": 100,
  "wall_seconds": {"step": 1.0},
  "goodput": {"share": 0.5, "starts": 2},
}


def write(folder, name, value):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(json.dumps(value))


def train_line(step, at, loss=2.5):
  speed = {"train/images_per_second": 1500.0, "train/input_wait": 0.01}
  return {"step": step, "time": at, "train/loss": loss, "train/top1": 0.1, **speed}


def write_lines(folder, *lines):
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def begin(folder, starts=1):
  config = base.get_config()
  config.total_epochs, config.total_steps = 0.0, 40
  write(folder, "config.json", config.to_dict())
  history = [{"step": 0, "time": 0.0}] * starts
  if starts > 1:
    history[-1] = {"step": 10, "time": 0.0, "changes": {"seed": [0, 1]}}
  write(folder, "starts.json", {"starts": starts, "first_start": 0.0, "history": history})
  write(folder, "environment.json", {"time": 0.0, "host": "h0", "hosts": 4, "devices": "32 x v4"})
  write(folder, "owner.json", {"renewed": time.time()})


def follow(folder, capsys, *changes):
  """Watch while each pause changes the workdir; return the code and the lines of each look."""
  left, shown = list(changes), []

  def pause(seconds):
    assert seconds == 7
    shown.append(capsys.readouterr().err.splitlines())
    left.pop(0)()

  code = watch.watch(str(folder), 7, pause=pause)
  assert not left
  return code, [*shown, capsys.readouterr().err.splitlines()]


def test_from_before_the_start_to_the_end(tmp_path, capsys):
  folder = tmp_path / "run"
  evaluation = {"step": 20, "time": 3.0, "eval/top1": 0.4, "eval/top5": 0.8, "eval/loss": None}
  other = {"step": 20, "time": 3.5, "eval/v2/top1": 0.3, "eval/v2/top5": 0.7, "eval/v2/loss": 1.5}

  def resumed():  # the line of step 20 is taken again
    begin(folder, starts=2)
    write_lines(folder, train_line(10, 1.0), train_line(20, 9.0, 2.25), evaluation, other)

  def stopped():
    (folder / "owner.json").unlink()

  def complete():
    write(folder, "final.json", FINAL)

  def first():
    begin(folder)
    write_lines(folder, train_line(10, 1.0), train_line(20, 2.0))

  code, looks = follow(
    folder, capsys, lambda: None, first, lambda: None, stopped, resumed, complete
  )
  assert code == DONE
  waiting, nothing, began, same, ended, again, done = looks
  assert "holds no run yet" in waiting[0] and len(waiting) == 1 and not nothing and not same
  assert began[0].startswith("ResNet-50, start 1, in ") and "32 x v4, hosts: 4" in began[1]
  assert [line.split(" ", 1)[1] for line in began[2:4]] == [
    "step 10/40  loss 2.5000  top1 10.0%  1500 img/s  input wait 1.0%",
    "step 20/40  loss 2.5000  top1 10.0%  1500 img/s  input wait 1.0%",
  ]
  assert began[4:] == ["The run is under way."]
  assert ended == ["No process works on this run now; waiting for one."]
  assert "start 2" in again[0] and "seed" in again[2]
  text = "\n".join(again)
  assert "step 20/40  loss 2.2500" in text and "step 10/40" not in text
  assert "eval: top1 40.00%  top5 80.00%  loss not finite" in text
  assert "eval of v2: top1 30.00%  top5 70.00%  loss 1.5000" in text
  assert done == ["Done: top1 50.00%, top5 90.00% on 100 examples after 2.0 epochs; goodput 50.0%."]


def test_a_run_that_fails_ends_the_watch(tmp_path, capsys):
  assert watch.watch(str(tmp_path), 7, once=True) == watch.NOT_COMPLETE
  assert capsys.readouterr().err == f"{tmp_path} holds no run yet.\n"
  begin(tmp_path)
  (tmp_path / "owner.json").unlink()
  write(tmp_path, "ended.json", {"reason": "Step 7 is not finite.", "code": 2, "time": 0.0})
  assert follow(tmp_path, capsys)[0] == watch.NOT_COMPLETE
  write(tmp_path, "owner.json", {"renewed": time.time()})  # a new start, which removes ended.json
  assert watch.watch(str(tmp_path), 7, once=True) == watch.NOT_COMPLETE
  assert "under way" in capsys.readouterr().err


def test_a_silent_bucket_is_waited_for_unless_at_the_first_look(tmp_path, capsys, monkeypatch):
  begin(tmp_path)
  read = recorded.read_files

  def fails(run):
    raise StorageError("it could not be read.")

  def breaks():
    monkeypatch.setattr(recorded, "read_files", fails)

  def mends():
    monkeypatch.setattr(recorded, "read_files", read)
    write(tmp_path, "final.json", FINAL)

  code, looks = follow(tmp_path, capsys, breaks, lambda: None, mends)
  assert code == DONE and looks[1] == ["it could not be read."] and not looks[2]
  breaks()
  with pytest.raises(StorageError):
    watch.watch(str(tmp_path), 7)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_look_reads_what_is_new(place, tmp_path, request, monkeypatch):
  if place == "bucket":
    request.getfixturevalue("server")
  folder = str(tmp_path / "a::b") if place == "folder" else "gs://bucket/tail"
  path = storage.path_of(folder) / "metrics"
  path.parent.mkdir(parents=True)
  files, _ = remote.filesystem(str(path))
  read, cat_file = [], files.cat_file

  def noted(name, start, end):
    read.append(end - start)
    return cat_file(name, start=start, end=end)

  monkeypatch.setattr(files, "cat_file", noted)  # fsspec has one instance
  tail = json_lines.Tail(path)
  lines = [train_line(step, 1.5 * step) for step in range(50)]
  texts = [f"{json.dumps(line)}\n" for line in lines]
  assert tail.read() == []
  path.write_text("".join(texts[:40]))
  assert tail.read() == lines[:40] and tail.read() == lines[:40]
  path.write_text("".join(texts[:41]) + texts[41][:9])  # a line that is being written
  assert tail.read() == lines[:41]
  path.write_text("".join(texts[:42]))
  assert tail.read() == lines[:42]
  size = list(map(len, texts))
  assert read == [sum(size[:40]), size[39] + size[40] + 9, size[40] + size[41]]
  again = [train_line(step, 100.0 + step) for step in range(30, 60)]  # after a kill
  path.write_text("".join(texts[:30]) + "".join(f"{json.dumps(line)}\n" for line in again))
  assert tail.read() == [*lines[:30], *again]
  path.write_text("".join(texts[:3]))
  assert tail.read() == lines[:3]
  path.unlink()
  assert tail.read() == []


def test_a_run_in_a_bucket(server, capsys):
  folder = storage.path_of("gs://bucket/watched")
  begin(folder)
  write_lines(folder, train_line(10, 1.0))

  def grows():
    write_lines(folder, train_line(10, 1.0), train_line(20, 2.0))

  def fails():
    grows()
    server.refuse("metrics", 403)

  def mends():
    server.answer()
    write(folder, "final.json", FINAL)

  code, (began, same, failed, done) = follow(folder, capsys, lambda: None, fails, mends)
  assert code == DONE and began[-1] == "The run is under way." and not same
  assert len(failed) == 1 and "metrics.jsonl could not be read" in failed[0]
  assert "step 20/40" in done[0] and done[-1].startswith("Done: top1 50.00%")


def test_nothing_is_written_and_an_interrupt_leaves_at_once(tmp_path):
  begin(tmp_path)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  command = [sys.executable, "-m", "trainer.watch", str(tmp_path), "--every=60"]
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
    while "under way" not in process.stderr.readline():
      assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT and not process.stderr.read()
  assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_wrong_workdir_is_one_sentence(capsys):
  assert watch.main(["s3://bucket/run"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
