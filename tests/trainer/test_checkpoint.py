"""A checkpoint is complete and true, or it does not exist; the best and the newest ones stay."""

import dataclasses
import random
import shutil
from typing import Any

from etils import epath
from flax import struct
import jax
import numpy as np
import pytest

from tests.trainer import tiny
from trainer import config as config_lib
from trainer import program as program_lib
from trainer.errors import FAILED, ConfigError, StorageError
from trainer.pod.pod import Pod
from trainer.state import fingerprints
from trainer.workdir.checkpoint import Checkpointer
from trainer.workdir.paths import Workdir

ALONE = Pod(tiny.get_config().pod)


@pytest.fixture(scope="module")
def program():
  config = tiny.get_config()
  config.optimizer.ema_decay = 0.9
  return config, program_lib.build(config, num_examples=64)


def make_state(program, step):
  state = jax.jit(program[1].init)()
  return jax.tree.map(lambda x: x if x.dtype == np.int32 else x + np.float32(step), state)


def save(checkpointer, program, steps, **meta):
  for step in steps:
    checkpointer.save_and_wait(
      step, make_state(program, step), {"best": None, "wall_seconds": {}} | meta
    )


def open_checkpointer(workdir, program, every_steps=0):
  return Checkpointer(ALONE, epath.Path(workdir), program[0], every_steps)


def kept(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_what_comes_back_is_what_was_saved(tmp_path, program):
  checkpointer = open_checkpointer(tmp_path, program)
  assert checkpointer.restore_newest(program[1].abstract_state) is None
  save(checkpointer, program, [7], best={"step": 7, "top1": 0.5})
  checkpointer.close()
  state, meta = open_checkpointer(tmp_path, program).restore_newest(program[1].abstract_state)
  expected = make_state(program, 7)
  assert int(state.step) == 7
  for name in ("params", "batch_stats", "opt_state", "ema"):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(expected, name))
  assert meta["best"] == {"step": 7, "top1": 0.5}
  assert meta["data"] == {"next_step": 7, "examples_seen": 56}


@struct.dataclass
class State:
  """A state with the fields that a checkpoint may find, whether or not the trainer has them all."""

  step: Any
  params: Any
  batch_stats: Any
  others: Any
  opt_state: Any
  ema: Any
  masks: Any = None


def test_absent_and_empty_parts_of_a_state_are_no_items(tmp_path, program):
  model = make_state(program, 7)
  state = State(jax.numpy.int32(7), model.params, {}, {}, model.opt_state, None)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  checkpointer = open_checkpointer(tmp_path, program)
  save_state(checkpointer, state)
  restored, _ = checkpointer.restore_newest(shapes)
  checkpointer.close()
  items = {p.name for p in (tmp_path / "checkpoints" / "7").iterdir() if p.is_dir()}
  assert items == {"params", "opt_state", "meta"}
  assert restored.batch_stats == {} and restored.others == {} and restored.ema is None
  jax.tree.map(np.testing.assert_array_equal, restored.params, model.params)


def test_state_of_other_kinds_comes_back(tmp_path, program):
  model = make_state(program, 7)
  others = {"queue": {"keys": jax.numpy.arange(12.0).reshape(3, 4)}}
  state = State(jax.numpy.int32(7), model.params, model.batch_stats, others, model.opt_state, None)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  checkpointer = open_checkpointer(tmp_path, program)
  save_state(checkpointer, state)
  restored, meta = checkpointer.restore_newest(shapes)
  assert "others/queue/keys" in meta["fingerprints"]
  np.testing.assert_array_equal(restored.others["queue"]["keys"], others["queue"]["keys"])
  # A checkpoint of before there was such state is as one where it is empty.
  save_state(checkpointer, dataclasses.replace(state, step=state.step + 1, others={}))
  restored, _ = checkpointer.restore_newest(dataclasses.replace(shapes, others={}))
  checkpointer.close()
  assert restored.others == {} and int(restored.step) == 8
  jax.tree.map(np.testing.assert_array_equal, restored.batch_stats, model.batch_stats)


def save_state(checkpointer, state):
  checkpointer.save_and_wait(int(state.step), state, {"best": None, "wall_seconds": {}})


def test_changes_that_were_allowed_are_in_the_meta(tmp_path, program, monkeypatch):
  checkpointer = open_checkpointer(tmp_path, program)
  save(checkpointer, program, [7])
  for changes in ({}, {"optimizer.lr_per_256": [0.1, 0.2]}):
    monkeypatch.setattr(config_lib, "check_same_run", lambda *_, found=changes: found)
    assert checkpointer.restore_newest(program[1].abstract_state)[1]["changes"] == changes
  checkpointer.close()


def test_newest_and_best_stay(tmp_path, program):
  program[0].checkpoint.keep_last = 2
  checkpointer = open_checkpointer(tmp_path, program)
  save(checkpointer, program, [1, 2])
  checkpointer.set_best(2)
  save(checkpointer, program, [3, 4, 5], best={"step": 2, "top1": 0.9})
  checkpointer.close()
  assert kept(tmp_path) == [2, 4, 5]
  # A new process learns from the checkpoint which one is the best.
  checkpointer = open_checkpointer(tmp_path, program)
  checkpointer.restore_newest(program[1].abstract_state)
  save(checkpointer, program, [6])
  checkpointer.close()
  assert kept(tmp_path) == [2, 5, 6]


def test_a_step_that_exists_is_left_alone(tmp_path, program):
  checkpointer = open_checkpointer(tmp_path, program)
  save(checkpointer, program, [3])
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
  save(checkpointer, program, [3])
  checkpointer.close()
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("ended", [shutil.rmtree, lambda folder: folder.rename(f"{folder}.old")])
def test_a_workdir_that_goes_away_under_a_run_is_said_as_it_is(tmp_path, program, caplog, ended):
  checkpointer = open_checkpointer(tmp_path / "run", program)
  save(checkpointer, program, [3])
  ended(tmp_path / "run")
  checkpointer.save(4, make_state(program, 4), {"best": None, "wall_seconds": {}})
  assert "removed, renamed or unmounted under this run). Training goes on" in caplog.text
  caplog.clear()
  with pytest.raises(StorageError, match=r"unmounted.*There is no whole checkpoint\.") as raised:
    save(checkpointer, program, [5])
  assert raised.value.exit_code == FAILED and "Training goes on" not in caplog.text
  assert not (tmp_path / "run").exists()  # a path that is no mount any more is not filled
  checkpointer.close()


def test_a_save_under_way_as_the_workdir_goes_away_is_not_taken_for_whole(
  tmp_path, program, caplog, monkeypatch
):
  """It makes the folders that it misses: where a mount was, on the disk behind it."""
  caplog.set_level("INFO")
  run = Workdir(epath.Path(tmp_path) / "run")
  checkpointer = open_checkpointer(run.path, program)
  run.config.write_text("{}")  # as every start does
  save(checkpointer, program, [3])
  original = checkpointer._manager.save

  def late(*args, **options):
    run.path.rename(tmp_path / "gone")
    original(*args, **options)
    run.checkpoints.mkdir(parents=True, exist_ok=True)

  monkeypatch.setattr(checkpointer._manager, "save", late)
  checkpointer.save(4, make_state(program, 4), {"best": None, "wall_seconds": {}})
  checkpointer.poll(wait=True)
  with pytest.raises(StorageError, match=r"unmounted.*There is no whole checkpoint\.") as raised:
    save(checkpointer, program, [5])
  assert raised.value.exit_code == FAILED
  assert "Checkpoint 4 is saved" not in caplog.text and kept(tmp_path / "gone") == [3]
  checkpointer.close()


def test_saves_are_due_by_steps_and_by_the_clock(tmp_path, program, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr("trainer.workdir.checkpoint.time.monotonic", lambda: now[0])
  program[0].checkpoint.every_minutes = 10.0
  checkpointer = open_checkpointer(tmp_path, program, every_steps=4)
  assert [step for step in range(1, 13) if checkpointer.due(step)] == [4, 8, 12]
  now[0] += 599
  assert not checkpointer.wanted()
  now[0] += 1
  assert checkpointer.wanted()
  save(checkpointer, program, [13])
  assert not checkpointer.wanted()
  checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, program):
  """A workdir with the checkpoints 10 and 20, to be copied before it is damaged."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpointer = open_checkpointer(workdir, program)
  save(checkpointer, program, [10, 20])
  checkpointer.close()
  return workdir


def restore_damaged(workdir, program, caplog):
  """Restores, and asserts that 10 was taken and 20 was named and set aside."""
  checkpointer = open_checkpointer(workdir, program)
  state, meta = checkpointer.restore_newest(program[1].abstract_state)
  checkpointer.close()
  assert meta["step"] == int(state.step) == 10
  jax.tree.map(np.testing.assert_array_equal, state.params, make_state(program, 10).params)
  assert kept(workdir) == [10]
  assert [p.name.split("-")[0] for p in (workdir / "damaged").iterdir()] == ["20"]
  assert any(
    "20 is damaged" in r.getMessage() and "set aside" in r.getMessage() for r in caplog.records
  )


@pytest.fixture
def workdir(tmp_path, saved):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


ITEMS = ["params", "batch_stats", "opt_state", "ema", "meta"]


@pytest.mark.parametrize("item", ITEMS)
def test_missing_item(workdir, program, caplog, item):
  shutil.rmtree(workdir / "checkpoints" / "20" / item)
  restore_damaged(workdir, program, caplog)


def test_empty_folder(workdir, program, caplog):
  shutil.rmtree(workdir / "checkpoints" / "20")
  (workdir / "checkpoints" / "20").mkdir()
  restore_damaged(workdir, program, caplog)


def payload(workdir, item):
  """Returns the largest file of an item: the one with the numbers in it."""
  return max(
    (p for p in (workdir / "checkpoints" / "20" / item).rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


@pytest.mark.parametrize("item", ITEMS)
def test_truncated_file(workdir, program, caplog, item):
  file = payload(workdir, item)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  restore_damaged(workdir, program, caplog)


@pytest.mark.parametrize("item", ITEMS)
def test_flipped_bits(tmp_path, saved, program, caplog, item):
  """What is restored is true; a flip where no number is (padding, names) may go unseen."""
  found = 0
  for seed in range(6):
    workdir = tmp_path / str(seed)
    shutil.copytree(saved, workdir)
    file = payload(workdir, item)
    data, rng = bytearray(file.read_bytes()), random.Random(seed)
    data[rng.randrange(len(data) // 4, 3 * len(data) // 4)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    if kept_after_restore(workdir, program) == [10]:
      found += 1
      assert any("20 is damaged" in r.getMessage() for r in caplog.records)
    caplog.clear()
  assert found >= 2


def kept_after_restore(workdir, program):
  """Restore, assert that the state is that of its step, and return the checkpoints that stay."""
  checkpointer = open_checkpointer(workdir, program)
  state, meta = checkpointer.restore_newest(program[1].abstract_state)
  checkpointer.close()
  expected = make_state(program, meta["step"])
  for name in ("params", "batch_stats", "opt_state", "ema"):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(expected, name))
  return kept(workdir)


def test_interrupted_save_is_no_checkpoint(workdir, program):
  (workdir / "checkpoints" / "20").rename(workdir / "checkpoints" / "20.orbax-checkpoint-tmp")
  checkpointer = open_checkpointer(workdir, program)
  assert checkpointer.restore_newest(program[1].abstract_state)[1]["step"] == 10
  checkpointer.close()
  assert not list((workdir / "checkpoints").glob("20*"))


def test_everything_damaged_leaves_nothing_to_restore(workdir, program):
  for step in (10, 20):
    shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
  checkpointer = open_checkpointer(workdir, program)
  assert checkpointer.restore_newest(program[1].abstract_state) is None
  checkpointer.close()
  assert len(list((workdir / "damaged").iterdir())) == 2


def test_another_config_is_refused_and_nothing_is_set_aside(workdir, program):
  config = program[0].copy_and_resolve_references()
  config.optimizer.momentum = 0.5
  checkpointer = Checkpointer(ALONE, epath.Path(workdir), config, 0)
  with pytest.raises(ConfigError, match=r"config\.optimizer\.momentum: 0\.9 -> 0\.5"):
    checkpointer.restore_newest(program[1].abstract_state)
  checkpointer.close()
  assert kept(workdir) == [10, 20]


def test_hash_sees_every_bit_and_every_place():
  rng = np.random.default_rng(0)
  for dtype in (np.float32, np.int32, np.uint8, jax.numpy.bfloat16):
    x = np.asarray(rng.integers(0, 100, (5, 7)), dtype)
    reference = fingerprints({"x": x})
    for _ in range(20):
      flipped = x.copy()
      flat = flipped.view(np.uint8).reshape(-1)
      flat[rng.integers(flat.size)] ^= np.uint8(1 << rng.integers(8))
      assert fingerprints({"x": flipped}) != reference
    swapped = x.copy()
    swapped[0, 0], swapped[4, 6] = x[4, 6], x[0, 0]
    assert (fingerprints({"x": swapped}) == reference) == (x[0, 0] == x[4, 6])
  assert fingerprints({"a": {"b": np.zeros(3, np.float32)}}).keys() == {"a/b"}
