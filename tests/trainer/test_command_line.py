"""The command line: help, names of run files, units that give way, wrong input of every kind."""

import glob
import os
import pathlib
import subprocess
import sys

import pytest

from configs import base, checks, recipes
from input_pipeline.tools import inspect
from tests.trainer import tiny
from trainer import __main__ as command
from trainer import command_line
from trainer import config as config_lib
from trainer.errors import DONE, FAILED, HOST_LOST
from trainer.workdir import storage

FLAGS = command_line.FLAGS
RUN_FILES = {
  "syntax.py": "def get_config(:\n  pass\n",
  "raises.py": "def get_config():\n  return 1 / 0\n",
  "none.py": "x = 1\n",
  "called.py": "get_config = None\n",
  "dict.py": "def get_config():\n  return {}\n",
  "ends.py": "import sys\n\ndef get_config():\n  sys.exit('no')\n",
  "lacks.py": "import no_such_module\n",
  "chosen.py": "def get_config(depth):\n  return {}\n",
  "field.py": "from configs import base\n\ndef get_config():\n"
  "  config = base.get_config('resnet')\n  config.optimizer.learning_rate = 0.1\n  return config\n",
}


@pytest.fixture
def typed(monkeypatch, tmp_path, caplog):
  """Return (exit code, errors) of `python -m trainer` with some flags, typed in an empty folder."""
  for name, text in RUN_FILES.items():
    (tmp_path / name).write_text(text)
  (tmp_path / "file").write_text("")
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

  def run(*flags):
    argv = ["trainer", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    for name in list(FLAGS):  # of the last call
      delattr(FLAGS, name) if name.startswith("config.") else FLAGS[name].unparse()
    caplog.clear()
    sys.modules.pop("config_config", None)  # the run file of the last call
    code = command.main(argv)
    return code, [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]

  return run


TINY = (f"--config={tiny.__file__}", "--workdir=run", "--config.data.kind=synthetic")
SMOKE = ("--config=smoke", "--workdir=run")
# What is typed, and words of the answer: what is wrong, and what to do.
WRONG = [
  ((), ["--config=configs/X.py and --workdir=DIR are needed", "--help"]),
  (("--config=smoke",), ["--workdir=DIR is needed", "--help"]),
  ((*SMOKE, "--wrkdir=x"), ["wrkdir", "Did you mean: workdir"]),
  ((*SMOKE, "mode=eval"), ["'mode=eval' is no flag", "did you mean --mode=eval?"]),
  ((*SMOKE, "eval"), ["'eval' is no flag; --help shows a typical line."]),
  ((*SMOKE, "--mode=evaluate"), ["--mode=evaluate", "train|eval"]),
  ((*SMOKE, "--trial=perhaps"), ["--trial=perhaps", "oolean"]),
  (("--config=smok", "--workdir=run"), ["smok does not exist", "did you mean smoke?"]),
  (("--config=resnet50.py", "--workdir=run"), ["did you mean", "imagenet_resnet50"]),
  (
    ("--config=zzz", "--workdir=run"),
    ["zzz does not exist", "there is cifar10_mdeq, "],
  ),
  (("--config=empty", "--workdir=run"), ["empty is a folder", "there is"]),
  (("--config=", "--workdir=run"), ["does not exist", "there is"]),
  (("--config=syntax.py", "--workdir=run"), ["syntax.py line 1", "SyntaxError"]),
  (("--config=raises.py", "--workdir=run"), ["raises.py line 2", "division by zero"]),
  (("--config=none.py", "--workdir=run"), ["none.py defines no function get_config"]),
  (("--config=dict.py", "--workdir=run"), ["get_config() returned dict", "ConfigDict"]),
  (("--config=imagenet_mlperf:7", "--workdir=run"), ["'7'", "there is 4096, 8192, 32768"]),
  (("--config=ends.py", "--workdir=run"), ["ends.py line 4: SystemExit: no"]),
  (("--config=lacks.py", "--workdir=run"), ["lacks.py line 1", "no_such_module"]),
  (("--config=called.py", "--workdir=run"), ["called.py defines no function get_config"]),
  (("--config=chosen.py", "--workdir=run"), ["chosen.py needs a variant", "chosen.py:VARIANT"]),
  (("--config=none.py:x", "--workdir=run"), ["none.py defines no function get_config"]),
  (("--config=smoke:x", "--workdir=run"), ["smoke.py has no variants; give it without ':x'"]),
  (("--config=field.py", "--workdir=run"), ["learning_rate is not", "optimizer.lr_per_256?"]),
  ((*SMOKE, "--epochs=3"), ["flag 'epochs'; did you mean --config.total_epochs?"]),
  ((*SMOKE, "--batch-size", "64"), ["did you mean --config.global_batch_size?"]),
  ((*SMOKE, "--data.path=x"), ["did you mean --config.data.path?"]),
  ((*SMOKE, "--frobnicate"), ["flag 'frobnicate'; --help shows"]),
  ((*SMOKE, "--config.batch_size=1"), ["did you mean config.global_batch_size?"]),
  ((*SMOKE, "--config.data.dir=x"), ["did you mean config.data.path?"]),
  ((*SMOKE, "--config.pretrained=True"), ["did you mean config.init_from?"]),
  ((*SMOKE, "--config.data.nonsense=1"), ["is not a field of configs/base.py."]),
  ((*SMOKE, "--config.model=resnet18"), ["section; set a field of it, as --config.model.name="]),
  ((*SMOKE, "--checkpoint=best"), ["--checkpoint=best is of --mode=eval", "config.init_from"]),
  ((*SMOKE, "--config.optimizer.rl=1"), ["optimizer.rl is not", "mean config.optimizer.lr?"]),
  ((*SMOKE, "--config.lr_per_256=1"), ["did you mean config.optimizer.lr_per_256?"]),
  ((*SMOKE, "--config.model.depht=20"), ["family cifar_resnet", "did you mean config.model.depth"]),
  ((*SMOKE, "--config.optimizer=sgd"), ["config.optimizer is a section", "set a field of it"]),
  ((*SMOKE, "--config.total_steps=many"), ["total_steps must be a whole number", "'many'"]),
  ((*SMOKE, "--config.total_epochs=1,5"), ["total_epochs must be a number", "'1,5'"]),
  ((*SMOKE, "--config.data.flip=perhaps"), ["data.flip must be True or False", "'perhaps'"]),
  ((*SMOKE, "--config.seed=-1"), ["config.seed must be in [0, 2**32); it is -1"]),
  ((*SMOKE, "--config.global_batch_size=0"), ["global_batch_size must be 1 or more; it is 0"]),
  ((*SMOKE, "--config.label_smoothing=nan"), ["label_smoothing must be a finite number"]),
  ((*SMOKE, "--config.optimizer.momentum=1"), ["momentum must be in [0, 1); it is 1"]),
  ((*SMOKE, "--config.data.crop_area=(1.0,0.5)"), ["data.crop_area must be (min, max)"]),
  ((*SMOKE, "--config.data.mean=7"), ["config.data.mean must be three numbers"]),
  ((*SMOKE, "--config.model.depth=9"), ["config.model.depth must be 6n+2"]),
  ((*SMOKE, "--config.model.dtype=int8"), ["one of bfloat16, float32, float64", "'int8'"]),
  ((*SMOKE, "--config.total_epochs=0"), ["total_epochs and config.total_steps are both 0; set"]),
  (
    (*SMOKE, "--config.total_steps=9", "--config.total_epochs=1"),
    ["config.total_epochs is 1.0 and config.total_steps is 9; set one of them to 0"],
  ),
  ((*SMOKE, "--help=zzz"), ["No field of the config has 'zzz'"]),
  ((*TINY, "--config.model.name=vgg"), ["config.model.name is 'vgg'; there is resnet"]),
  (
    (*TINY, "--config.loss=softmax"),
    ["config.loss is 'softmax'; there is softmax_cross_"],
  ),
  ((*TINY, "--config.augment=mixup(alfa=1)"), ["no argument 'alfa'; did you mean alpha?"]),
  ((*TINY, "--config.optimizer.schedule=cosin"), ["did you mean cosine?"]),
  ((*TINY, "--config.optimizer.name=adam"), ["config.optimizer.name is 'adam'", "adamw"]),
  ((*TINY, "--config.data.kind=tfrecord"), ["config.data.kind is 'tfrecord'", "array_record"]),
  ((*TINY, "--config.data.image_sizes=big"), ["config.data.image_sizes", "big"]),
  ((*TINY, "--config.resume.allow=lr"), ["config.resume.allow names lr", "optimizer.lr?"]),
  ((*TINY, "--config.optimizer.warmup_steps=10"), ["makes 10 steps", "must be shorter"]),
  ((*TINY, "--config.log.profile_step=9"), ["log.profile_step is 9", "has only 10 steps"]),
  ((*TINY, "--config.optimizer.freeze=^tail"), ["optimizer.freeze", "^tail"]),
  (
    (*TINY, "--config.init_from=nowhere.pth"),
    ["config.init_from", "There is no file or folder nowhere.pth"],
  ),
  ((*TINY, "--config.mesh.data=7"), ["config.mesh.data", "do not make up the"]),
  ((*TINY, "--config.data.kind=auto"), ["config.data.path is empty; give --config.data.path"]),
  ((*TINY, "--config.data.kind=auto", "--config.data.path=nowhere"), ["nowhere", "not exist"]),
  ((*TINY, "--config.data.kind=auto", "--config.data.path=file"), ["is a file", "give the folder"]),
  ((*TINY, "--config.data.kind=auto", "--config.data.path=empty"), ["is empty; fill it"]),
  ((*TINY, "--workdir=file"), ["file"]),
  ((*TINY, "--mode=eval"), ["run holds no checkpoint to evaluate; train first"]),
  (("--mode", "eval", "--workdir", "nowhere"), ["nowhere holds no config.json"]),
  (("--config", "smoke", "--workdir", "run", "--config.total_epochs", "many"), ["it is 'many'"]),
]


@pytest.mark.parametrize("flags, words", WRONG, ids=lambda x: " ".join(x[2:])[:60] or None)
def test_wrong_input_is_answered_in_one_sentence(typed, flags, words):
  code, errors = typed(*flags)
  assert code == FAILED and len(errors) == 1
  assert "\n" not in errors[0] and all(word in errors[0] for word in words), errors[0]
  assert not glob.glob("run/checkpoints/[0-9]*")


@pytest.mark.parametrize("field", ["model.name", "loss", "data.kind", "optimizer.schedule"])
@pytest.mark.parametrize(
  ("module", "code", "says"),
  [
    ("own_name", "x = undefined\n", "own_name.py line 1: NameError: name 'undefined' is not"),
    ("own_syntax", "\ndef (:\n", "own_syntax.py line 2: SyntaxError: invalid syntax."),
    ("own_raises", "raise RuntimeError('two\\nlines.')", "line 1: RuntimeError: two lines."),
    ("own_ends", "import sys\nsys.exit('no')", "own_ends.py line 2: SystemExit: no."),
    ("own_lacks", "import no_such_module", "own_lacks.py line 1: ModuleNotFoundError: No module"),
    ("own_other", "", "module 'own_other' has no attribute 'Mine'."),
  ],
)
def test_a_module_of_ones_own_that_raises(typed, tmp_path, monkeypatch, field, module, code, says):
  (tmp_path / f"{module}.py").write_text(code)
  monkeypatch.syspath_prepend(str(tmp_path))
  code, (said,) = typed(*TINY, f"--config.{field}={module}:Mine")
  assert code == FAILED and "\n" not in said
  assert f"config.{field} is '{module}:Mine', which cannot be imported" in said and says in said


def test_a_family_that_is_none(typed, tmp_path, monkeypatch):
  (tmp_path / "own_family.py").write_text("class Net: pass\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  code, (said,) = typed(*TINY, "--config.model.name=own_family:Net")
  assert code == FAILED and "is no subclass of trainer.models.family.Family" in said


@pytest.mark.parametrize("file", [*RUN_FILES, "none.py:x", "smoke:x", "zzz"])
def test_inspect_says_of_a_run_file_what_the_trainer_says(typed, capsys, file):
  code, (said,) = typed(f"--config={file}", "--workdir=run")
  sys.modules.pop("config_config", None)
  assert inspect.main(["inspect", "--data=empty", f"--config={file}"]) == code == FAILED
  assert capsys.readouterr().err.splitlines()[-1] == f"inspect: {said}"


def test_names_of_other_trainers_stand_for_fields_and_hide_none():
  fields = base.all_fields("resnet")
  assert set(checks.ELSEWHERE) <= set(fields)
  own = {name.rpartition(".")[2] for name in fields} - {"batch_size"}  # of an evaluation
  assert not own & {word for words in checks.ELSEWHERE.values() for word in words}
  for name, words in checks.ELSEWHERE.items():
    assert all(checks.nearest(word, fields) == name for word in words)


def test_a_workdir_among_the_images_is_refused_before_it_is_made(typed):
  for name in ("cat", "dog"):
    os.makedirs(f"photos/{name}")
    pathlib.Path(f"photos/{name}/0.jpg").write_bytes(b"x")
  for workdir in ("photos", "photos/run", "photos/../photos/cat/x"):
    code, (said,) = typed(
      "--config=own_images", f"--workdir={workdir}", "--config.data.path=photos"
    )
    assert code == FAILED and "is in the folder of the images, photos; give another" in said
  assert sorted(os.listdir("photos")) == ["cat", "dog"]
  code, (said,) = typed("--config=own_images", "--workdir=photos2", "--config.data.path=photos")
  assert code == FAILED and "has one image, of which none can be held out" in said


WITHOUT_JAX = """
import sys
from launch import preflight
from trainer import __main__ as command
codes = []
for flags in (
  ["--help"], ["-h"], ["--helpfull"], ["--list"], ["--config=smoke", "--help=lr"],
  ["--config=imagenet_resnet50", "--help"], ["--config=smok", "--workdir=x"],
  ["--config=smoke", "--workdir=x", "--config.optimizer.rl=1"],
  ["--config=smoke", "--workdir=x", "--config.model.depth=9"],
):
  sys.argv = ["trainer", *flags]
  codes.append(command.main(sys.argv))
sys.argv = ["preflight", "--help"]
codes.append(preflight.main(sys.argv))
print("imported jax" if "jax" in sys.modules else "no jax", codes)
"""


def test_help_and_refusals_come_without_jax():
  ended = subprocess.run(
    [sys.executable, "-c", WITHOUT_JAX], capture_output=True, text=True, check=True
  )
  assert ended.stdout.splitlines()[-1] == "no jax [0, 0, 0, 0, 0, 0, 2, 2, 2, 0]"
  # Nothing of absl's about lines before its flags are parsed.
  assert len(ended.stderr.splitlines()) == 3 and "WARNING" not in ended.stderr


def test_help_is_short_and_fields_are_in_sections(typed, capsys):
  assert typed("--help") == (DONE, [])
  short = capsys.readouterr().out
  assert len(short.splitlines()) < 20 and max(map(len, short.splitlines())) <= 100
  for word in ("--mode=train|eval", "--help=WORD", "--list", "--workdir=runs/r50"):
    assert word in short
  assert typed("--helpfull") == (DONE, [])
  full = capsys.readouterr().out
  assert short.splitlines()[0] in full and "\n\nconfig.optimizer\n--config.optimizer.name" in full
  for name in base.all_fields("resnet"):
    assert f"--config.{name} = " in full
  assert typed("--config=smoke", "--help=optimizer") == (DONE, [])
  narrow = capsys.readouterr().out
  assert "--config.optimizer.lr_per_256 = 0.4 (default 0.1)" in narrow
  assert "--config.mesh.data" not in narrow and "--mode" not in narrow


def test_list_has_every_run_file_in_a_line(typed, capsys):
  assert typed("--list") == (DONE, [])
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 100
  assert [line.split()[0] for line in lines] == sorted({n.split(":")[0] for n in recipes.names()})
  assert all(len(line.split()) > 3 for line in lines)


def test_a_run_file_is_found_by_name_and_a_file_of_ones_own_comes_first(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  packaged = os.path.join(os.path.dirname(base.__file__), "imagenet_mlperf.py")
  for word in ("imagenet_mlperf", "imagenet_mlperf.py", "configs/imagenet_mlperf.py"):
    assert recipes.path_of(f"{word}:8192") == f"{packaged}:8192"
  (tmp_path / "smoke.py").write_text("")
  assert recipes.path_of("smoke.py") == "smoke.py"
  with pytest.raises(ValueError, match="does not exist"):
    recipes.path_of("elsewhere/smoke.py")


def test_flags_in_two_words():
  typed = ("plan", "--config", "smoke:x", "--config.augment", "mix(p=1)", "--trial", "-f=1", "2")
  one = ["plan", "--config=smoke:x", "--config.augment=mix(p=1)", "--trial", "-f=1", "2"]
  assert recipes.joined(typed) == recipes.joined(one) == one
  assert command_line.name_of(list(typed)) == "smoke:x"


def test_the_run_file_may_stand_anywhere(typed):
  fields = ["--config.total_epochs=7", "--config.model.depth=34"]
  for place in range(3):
    for file in (["--config=smoke"], ["--config", "smoke"]):
      argv = ["plan", *fields[:place], *file, *fields[place:]]
      assert recipes.joined(argv) == ["plan", "--config=smoke", *fields]
      assert command_line.name_of(argv) == "smoke"
  code, errors = typed("--config.data.path=none", "--workdir=w", "--config", "smoke")
  assert code == FAILED
  assert "none" in errors[0] and "before" not in errors[0]


def test_the_other_unit_gives_way_to_the_command_line():
  config = base.get_config()
  config.total_steps = 20
  assert command_line.give_way(config, {"total_steps": 20, "seed": 1}) == [
    "config.total_epochs=90 gives way to config.total_steps=20."
  ]
  assert config.total_epochs == 0 and isinstance(config.total_epochs, float)
  config_lib.validate(config)
  config.optimizer.lr = 0.5
  assert len(command_line.give_way(config, {"optimizer.lr": 0.5})) == 1
  assert config.optimizer.lr_per_256 == 0 and config.optimizer.lr == 0.5
  # A warm-up in steps that the run file sets, but not one that is given beside the length.
  config.total_steps, config.optimizer.warmup_epochs, config.optimizer.warmup_steps = 20, 0.0, 400
  assert not command_line.give_way(config, {"total_steps": 20, "optimizer.warmup_steps": 400})
  assert command_line.give_way(config, {"total_steps": 20}) == [
    "config.optimizer.warmup_steps=400 is cut to 2 of 20 steps."
  ]
  assert config.optimizer.warmup_steps == 2
  # Both given, none given, or taken back: nothing to do.
  config.total_epochs = 1.0
  assert not command_line.give_way(config, {"total_steps": 20, "total_epochs": 1.0})
  assert not command_line.give_way(config, {"total_steps": 0})


def test_the_warmup_of_a_trial_is_cut():
  config = base.get_config()
  config.total_epochs, config.total_steps = 0.0, 20
  lengths = config_lib.durations(config, num_examples=1_281_167)
  assert (lengths.total, lengths.warmup, lengths.uncut_warmup) == (20, 2, 6256)
  config.total_steps = 10_000
  lengths = config_lib.durations(config, num_examples=1_281_167)
  assert (lengths.warmup, lengths.uncut_warmup) == (6256, 0)


def silent(path):
  """Read a file of a bucket that does not answer."""
  raise TimeoutError("no answer")


def test_a_saved_config_that_cannot_be_read(typed, tmp_path, monkeypatch):
  (tmp_path / "run" / "config.json").mkdir(parents=True)
  code, (said,) = typed("--mode=eval", "--workdir=run")
  assert code == FAILED and "Is a directory" in said and "give the --config of the run" in said
  code, (said,) = typed("--mode=eval", "--workdir=ftp://run")
  assert code == FAILED and "neither a folder nor gs://" in said
  monkeypatch.setattr(storage, "read_whole", silent)
  code, (said,) = typed("--mode=eval", "--workdir=gs://bucket/run")
  assert code == HOST_LOST and "config.json cannot be read (TimeoutError: no answer); run" in said
