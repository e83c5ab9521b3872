"""Event files: clu's writers without TensorFlow in a fresh process, and what is read back."""

import inspect
import os
import subprocess
import sys
import textwrap

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto import plugin_hparams_pb2

from trainer.reporting import events
from trainer.reporting.clu import metric_writers


def in_fresh_process(code, *arguments):
  """Run code in a new interpreter: what one import leaves behind hides what another lacks."""
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


def write(logdir, scalars_by_step):
  writer = events.EventWriter(str(logdir))
  for step, scalars in scalars_by_step.items():
    writer.write_scalars(step, scalars)
  writer.close()


def test_async_writer_and_periodic_actions_need_no_tensorflow(tmp_path):
  result = in_fresh_process(
    """
      import sys, time
      from trainer.reporting import events
      from trainer.reporting.clu import metric_writers, periodic_actions
      import jax.numpy as jnp

      writer = metric_writers.AsyncMultiWriter([events.EventWriter(sys.argv[1])])
      writer.write_hparams({"depth": 50})
      progress = periodic_actions.ReportProgress(num_train_steps=8, writer=writer, every_steps=2,
                                                 every_secs=None)
      periodic_actions.Profile(logdir=sys.argv[1], first_profile=100)
      for step in range(1, 9):
        writer.write_scalars(step, {"train/loss": jnp.float32(1 / step), "train/top1": step / 8})
        time.sleep(0.01)
        progress(step)
      writer.flush()
      writer.close()
      loaded = {name.split(".")[0] for name in sys.modules}
      assert not loaded & {"tensorflow", "torch", "tensorboard", "matplotlib"}, loaded
      """,
    tmp_path,
  )
  assert result.returncode == 0, result.stderr
  scalars = events.read_scalars(tmp_path)
  steps, values, wall_times = scalars["train/loss"]
  np.testing.assert_array_equal(steps, np.arange(1, 9))
  np.testing.assert_allclose(values, 1 / np.arange(1, 9), rtol=1e-6)
  assert (np.diff(wall_times) > 0).all() and wall_times[0] > 1.7e9
  assert (steps.dtype, values.dtype, wall_times.dtype) == ("int64", "float64", "float64")
  # The first report only starts the clock.
  assert len(scalars["steps_per_sec"][0]) >= 2 and (scalars["steps_per_sec"][1] > 0).all()
  assert len(list(tmp_path.glob("*tfevents*"))) == 1


def test_torch_is_not_imported_and_can_be_later(tmp_path):
  (tmp_path / "torch.py").write_text("Tensor = int")
  result = in_fresh_process(
    """
      import sys
      sys.path.insert(0, sys.argv[1])
      from trainer.reporting import events
      assert "torch" not in sys.modules
      import torch
      assert torch.Tensor is int
      """,
    tmp_path,
  )
  assert result.returncode == 0, result.stderr


# A TensorFlow as far as clu asks for it when it is imported.
FAKE_TENSORFLOW = {
  "tensorflow/__init__.py": "",
  "tensorboard/__init__.py": "",
  "tensorboard/plugins/__init__.py": "",
  "tensorboard/plugins/hparams/__init__.py": "",
  "tensorboard/plugins/hparams/api.py": "",
}


@pytest.fixture(params=["without TensorFlow", "with TensorFlow"])
def packages(request, tmp_path):
  """A folder to be first on the path of a process: TensorFlow is installed there, or hidden."""
  hidden = {"tensorflow.py": "raise ImportError"}
  for name, content in (FAKE_TENSORFLOW if request.param.startswith("with ") else hidden).items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  return tmp_path


@pytest.mark.parametrize(
  "first",
  [
    "import trainer.reporting.clu",
    "import trainer.reporting.events",
    "from trainer.reporting import telemetry",
    "from clu import metric_writers",
    "from clu import periodic_actions",
  ],
)
def test_imports_work_in_any_order(packages, first):
  result = in_fresh_process(
    f"""
      import contextlib, sys
      sys.path.insert(0, sys.argv[1])
      with contextlib.suppress(ImportError):
        {first}
      clu_was_first = "clu.metric_writers" in sys.modules and "trainer" not in sys.modules
      from trainer.reporting import events, telemetry
      from trainer.reporting.clu import metric_writers
      assert ("tensorflow" in sys.modules) == clu_was_first
      from clu import metric_writers as theirs, periodic_actions
      assert metric_writers is theirs is periodic_actions.metric_writers is telemetry.metric_writers
      assert issubclass(events.EventWriter, theirs.MetricWriter)
      assert ("clu.metric_writers.summary_writer" in sys.modules) == clu_was_first
      """,
    packages,
  )
  assert result.returncode == 0, result.stderr


def test_the_writer_of_tensorflow_names_ours():
  with pytest.raises(NotImplementedError, match=r"use trainer\.reporting\.events\.EventWriter"):
    metric_writers.SummaryWriter("anywhere")


def test_writer_has_the_whole_interface_of_clu():
  interface = metric_writers.MetricWriter
  assert issubclass(events.EventWriter, interface)
  for name in interface.__abstractmethods__:
    theirs = inspect.signature(getattr(interface, name)).parameters
    ours = inspect.signature(getattr(events.EventWriter, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
      (p.name, p.kind, p.default) for p in theirs.values()
    ], name


def test_all_kinds_go_through_the_async_writer_beside_scalars(tmp_path):
  writer = metric_writers.AsyncMultiWriter([events.EventWriter(str(tmp_path))])
  writer.write_hparams({"optimizer.name": "sgd", "seed": 0, "steps": (1, 2)})
  writer.write_texts(step=1, texts={"note": "**hello**"})
  writer.write_histograms(1, {"weights": jnp.arange(100.0)}, num_buckets={"weights": 7})
  writer.write_histograms(1, {"default": np.arange(100)})
  writer.write_images(1, {"image": np.zeros((4, 5, 3)), "grid": np.zeros((2, 4, 5, 3), np.uint8)})
  writer.write_videos(1, {"video": np.zeros((1, 2, 4, 5, 3))})
  writer.write_audios(1, {"audio": np.zeros((1, 9, 1))}, sample_rate=8000)
  writer.write_summaries(1, {"raw": np.zeros(3)})
  writer.write_scalars(1, {"loss": np.float32(2.0), "nan": float("nan"), "one": jnp.ones(1)})
  writer.flush()
  scalars = events.read_scalars(tmp_path)
  assert list(scalars) == ["loss", "nan", "one"]
  assert scalars["loss"][1] == [2.0] and np.isnan(scalars["nan"][1]).all()
  writer.close()
  (file,) = tmp_path.iterdir()
  written = {
    value.tag: value for event in events._events(epath.Path(file)) for value in event.summary.value
  }
  session = written["_hparams_/session_start_info"].metadata.plugin_data
  found = plugin_hparams_pb2.HParamsPluginData.FromString(
    session.content
  ).session_start_info.hparams
  assert session.plugin_name == "hparams"
  assert (found["optimizer.name"].string_value, found["seed"].number_value) == ("sgd", 0)
  assert found["steps"].string_value == "(1, 2)"
  experiment = written["_hparams_/experiment"].metadata.plugin_data.content
  compared = plugin_hparams_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
  assert "eval/top1" in [info.name.tag for info in compared]
  assert b"| optimizer.name | sgd |" in written["hparams/text_summary"].tensor.string_val[0]
  assert written["note/text_summary"].tensor.string_val[0] == b"**hello**"
  assert sum(written["weights"].histo.bucket) == 100
  assert len(written["weights"].histo.bucket) == 8  # tensorboardX adds an empty one on the left
  assert len(written["default"].histo.bucket) == 31
  assert (written["grid"].image.height, written["grid"].image.width) == (4, 10)


def test_flush_puts_everything_into_the_file(tmp_path):
  writer = events.EventWriter(str(tmp_path))
  writer.write_scalars(3, {"loss": 0.5})
  writer.flush()
  assert events.read_scalars(tmp_path)["loss"][0] == [3]
  writer.close()


def test_a_full_disk_ends_the_file_and_nothing_else(tmp_path, caplog):
  writer = events.EventWriter(str(tmp_path))
  writer.write_scalars(1, {"loss": 0.5})
  writer.flush()
  with open("/dev/full", "wb") as full:
    writer._records._writer, file = full, writer._records._writer
    for step in (2, 3):
      writer.write_scalars(step, {"loss": 0.5})
      writer.flush()
    writer.close()
    full.raw.close()  # else Python tries again at the end of the block
  file.close()
  assert caplog.text.count("could not be written (OSError: [Errno 28]") == 1
  assert events.read_scalars(tmp_path)["loss"][0] == [1]


def test_later_file_wins_where_a_resumed_run_repeats_steps(tmp_path, monkeypatch):
  clock = iter(range(1_800_000_000, 1_900_000_000, 10))
  monkeypatch.setattr(events.time, "time", lambda: next(clock))
  write(tmp_path, {step: {"loss": 1.0} for step in (10, 20, 30, 40)})
  write(tmp_path, {step: {"loss": 2.0} for step in (30, 40, 50)})
  write(tmp_path, {40: {"loss": 3.0, "eval/top1": 0.5}})
  assert len(list(tmp_path.iterdir())) == 3  # though opened in the same second
  # The names sort against the order of writing, as they may if the runs were on different hosts.
  for i, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
    path.rename(tmp_path / f"events.out.tfevents.{9 - i}")
  steps, values, wall_times = events.read_scalars(tmp_path)["loss"]
  assert steps.tolist() == [10, 20, 30, 40, 50]
  assert values.tolist() == [1.0, 1.0, 2.0, 3.0, 2.0]
  assert wall_times[3] == wall_times.max()
  assert events.read_scalars(tmp_path)["eval/top1"][0].tolist() == [40]


@pytest.mark.parametrize("missing", [1, 4, 5, 20, 40])
def test_torn_last_record_is_left_out(tmp_path, missing):
  write(tmp_path, {step: {"train/loss": float(step)} for step in range(5)})
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-missing])
  steps, values, _ = events.read_scalars(tmp_path)["train/loss"]
  np.testing.assert_array_equal(steps, values)
  assert steps.tolist() == [0, 1, 2, 3]
  # The next file of the run is read nevertheless.
  write(tmp_path, {9: {"train/loss": 9.0}})
  assert events.read_scalars(tmp_path)["train/loss"][0].tolist() == [0, 1, 2, 3, 9]


def test_flipped_bit_ends_the_file(tmp_path):
  write(tmp_path, {step: {"loss": float(step)} for step in range(5)})
  (path,) = tmp_path.iterdir()
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  assert events.read_scalars(tmp_path)["loss"][0].tolist() == [0, 1, 2, 3]


def test_folders_without_scalars(tmp_path):
  assert events.read_scalars(tmp_path) == {}
  (tmp_path / "events.out.tfevents.0").write_bytes(b"")
  (tmp_path / "notes.txt").write_bytes(b"no event file")
  assert events.read_scalars(str(tmp_path)) == {}
  with pytest.raises(FileNotFoundError):
    events.read_scalars(tmp_path / "absent")


def test_a_bucket_holds_what_was_flushed(tmp_path, monkeypatch):
  # A folder in the place of the bucket: etils, not tensorboardX, is to do the writing.
  real = epath.Path
  monkeypatch.setattr(
    events.epath, "Path", lambda path: real(str(path).replace("gs://bucket", str(tmp_path)))
  )
  writer = events.EventWriter("gs://bucket")
  assert isinstance(writer._records._writer, events.BucketFile)
  assert isinstance(record_writer.REGISTERED_FACTORIES["gs"], events.BucketFiles)
  for step in (1, 2):
    writer.write_scalars(step, {"loss": 1.0})
    writer.flush()
    assert events.read_scalars("gs://bucket")["loss"][0][-1] == step
  writer.write_scalars(3, {"loss": 1.0})
  writer.close()
  assert events.read_scalars("gs://bucket")["loss"][0].tolist() == [1, 2, 3]
