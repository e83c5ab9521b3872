"""Interfaces that libraries do not promise to keep: an upgrade that breaks one is named here."""

import inspect
import os
import subprocess
import sys

from absl import flags
import pytest
import tensorstore

from trainer.workdir import storage


def test_jax_finds_clusters():
  words = (
    "trainer/pod/pod.py asks jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params "
    "for the cluster that JAX would find (address of host 0, number of hosts, number of this host, "
    "local devices). This version of JAX has changed it: look for what "
    "jax.distributed.initialize() calls when it is given no arguments, and adapt _find_hosts."
  )
  try:
    from jax._src import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    names = list(inspect.signature(detect).parameters)
  except (ImportError, AttributeError) as error:
    pytest.fail(f"{words} ({error})")
  assert names == [
    "coordinator_address",
    "num_processes",
    "process_id",
    "local_device_ids",
    "cluster_detection_method",
    "initialization_timeout",
  ], words
  # Outside of any cluster all four are unknown.
  code = (
    "from jax._src import clusters; print("
    "clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1))"
  )
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120
  )
  assert found.stdout.strip() == "(None, None, None, None)", f"{words}\n{found.stderr}"


def test_orbax_takes_the_retries_of_tensorstore_from_its_contexts(monkeypatch):
  words = (
    "trainer/workdir/storage.py limits the retries of writes to buckets by gcs_request_retries "
    "in _BASE_TS_CONTEXT and _DEFAULT_OCDBT_TS_CONTEXT of "
    "orbax.checkpoint._src.serialization.tensorstore_utils. This version of Orbax has changed "
    "them: look for where it makes its tensorstore.Context, or for a new option, and adapt "
    "_configure."
  )
  try:
    from orbax.checkpoint._src.serialization import tensorstore_utils

    contexts = tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT
    get_context = tensorstore_utils.get_ts_context
  except (ImportError, AttributeError) as error:
    pytest.fail(f"{words} ({error})")
  expected = tensorstore.Context.Spec({"gcs_request_retries": storage._RETRIES}).to_json()
  for use_ocdbt, context in zip((False, True), contexts):
    monkeypatch.setitem(context, "gcs_request_retries", storage._RETRIES)
    made = get_context(use_ocdbt=use_ocdbt)
    assert isinstance(made, tensorstore.Context), words
    assert made.spec.to_json().get("gcs_request_retries") == expected["gcs_request_retries"], words


def test_orbax_has_a_flag_for_barriers_of_the_coordination_service():
  import orbax.checkpoint  # noqa: F401  (defines the flag)

  assert "experimental_orbax_use_distributed_barrier" in flags.FLAGS, (
    "trainer/workdir/checkpoint.py sets the flag experimental_orbax_use_distributed_barrier, so "
    "that hosts wait for each other with a time limit and from any thread. This version of Orbax "
    "has no such flag: look in orbax/checkpoint/_src/multihost/multihost.py for how "
    "sync_global_processes waits, and adapt Checkpointer.__init__."
  )


def test_clu_imports_tensorflow_for_one_writer_only(tmp_path):
  (tmp_path / "tensorflow.py").write_text("raise ImportError('no TensorFlow')")
  code = "import sys; sys.path.insert(0, sys.argv[1]); import clu.metric_writers"
  result = subprocess.run(
    [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120
  )
  assert "clu/metric_writers/summary_writer.py" in result.stderr and result.returncode == 1, (
    "trainer/reporting/clu.py keeps clu.metric_writers.summary_writer out while clu is imported, "
    "because it imports TensorFlow. This version of clu imports it elsewhere, or no more: if "
    "`import clu.metric_writers` works without TensorFlow, and does not import one that is "
    "installed, remove trainer/reporting/clu.py and import clu itself.\n" + result.stderr
  )
