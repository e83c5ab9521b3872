"""Every field of a run with its default, unit, range and words.

A run file calls `get_config()` with its model family and only overrides. Durations carry their
unit in the name. Where a field exists as `*_epochs` and `*_steps`, at most one of the two is not 0;
`trainer.config` turns both into steps.
"""

import re

import ml_collections

from configs import data_fields, families, sparsity_fields
from configs.fields import (
  ASK,
  PATTERN,
  POSITIVE,
  SHARE,
  YES,
  Check,
  Field,
  Fields,
  at_least,
  between,
  one_of,
  to_config,
)

_AXIS_OR_REST = Check("1 or more, or -1 for all that is left", lambda v: v == -1 or v >= 1)

RUN: Fields = {
  "seed": Field(
    0,
    "Initialisation, data order, augmentation and all randomness of a step are functions of it.",
    check=Check("in [0, 2**32)", lambda v: 0 <= v < 2**32),
  ),
  "global_batch_size": Field(
    1024, "Examples per step, over all devices of all hosts.", "examples", at_least(1), ASK
  ),
  "total_epochs": Field(
    90.0, "Length of the run; set exactly one of the two.", "epochs", at_least(0), ASK
  ),
  "total_steps": Field(0, "Length of the run.", "steps", at_least(0), ASK),
  "accumulation_steps": Field(
    1,
    "Micro-batches that a step is computed in, to save memory; see trainer/step.py.",
    "micro-batches",
    at_least(1),
    ASK,
  ),
  "label_smoothing": Field(
    0.1, "Share of each target spread over all classes (arXiv:1512.00567).", "", SHARE, ASK
  ),
  "loss": Field(
    "softmax_cross_entropy",
    "Loss of an example: a function of trainer/losses.py, or package.module:function, with options "
    "as in 'sigmoid_cross_entropy(threshold=0.2)'.",
    resume=ASK,
  ),
  "augment": Field(
    "",
    "Chain of functions of trainer/augment.py on the device, as in 'mixup(alpha=0.2)|...'.",
    resume=ASK,
  ),
  "augment_until_epochs": Field(
    0.0,
    "From then on config.augment is off; 0 is never.",
    "epochs",
    at_least(0),
    ASK,
  ),
  "compilation_cache": Field(
    "workdir",
    "Where compiled programs are kept, so that a restart compiles nothing: workdir "
    "(WORKDIR/compiled) | a folder, local or gs:// | '' for nowhere. The environment variable "
    "JAX_COMPILATION_CACHE_DIR takes precedence.",
    resume=YES,
  ),
  "compiler_options": Field(
    "",
    "Options of XLA for the training step beside those of trainer/compiler.py, as in "
    "'xla_tpu_async_copy_bandwidth_scaling_factor=0.55 xla_other=true'. They are of one kind of "
    "device: others refuse them.",
    check=Check(
      "NAME=VALUE of options that begin with xla_, apart by spaces",
      lambda v: all(re.fullmatch(r"xla_\w+=\S+", each) for each in v.split()),
    ),
    resume=ASK,
  ),
  "init_from": Field(
    "",
    "Weights that step 0 of a new run takes: a file that trainer.weights reads, or a workdir (its "
    "averages where it has them), local, gs:// or https:// with a checksum. The head is made anew "
    "where the number of classes differs. A resume does not read it.",
    resume=YES,
  ),
  "init_exclude": Field(
    "",
    "Regular expression of leaves that init_from leaves alone, searched for in their path, as in "
    "'^head/|^stage4'; and of tensors of the file that have no place in the model.",
    check=PATTERN,
    resume=YES,
  ),
  "distill.teacher": Field(
    "",
    "Weights that the run learns from, with distill.weight: a workdir, local or gs://, or a file "
    "that says of which model it is (trainer.weights export). Its classes must be those of the "
    "data. A resume must find the same weights, wherever they lie.",
    resume=YES,
  ),
  "distill.weight": Field(
    0.0,
    "Share of the teacher in the loss, the rest is config.loss: 0, no teacher | 1, the teacher "
    "alone (FunMatch, arXiv:2106.05237).",
    "",
    between(0, 1),
    ASK,
  ),
  "distill.temperature": Field(
    1.0,
    "Divides the logits of both nets; FunMatch tries 1 to 10 (arXiv:2106.05237).",
    "",
    POSITIVE,
    ASK,
  ),
  "mesh.data": Field(
    -1,
    "Examples are split over it; -1 is all that the other two leave.",
    "devices",
    _AXIS_OR_REST,
    YES,
  ),
  "mesh.fsdp": Field(
    1, "Examples are split over it as well, and so may parameters be.", "devices", at_least(1), YES
  ),
  "mesh.space": Field(
    1, "The height of images is split over it, inside one host.", "devices", at_least(1), YES
  ),
  "sharding.params": Field(
    "replicated",
    "fsdp: each device of the axis fsdp keeps its part of the parameters.",
    check=one_of("replicated", "fsdp"),
    resume=YES,
  ),
  "sharding.opt_state": Field(
    "replicated",
    "replicated: as params | data: over data and fsdp (arXiv:2004.13336); above 8 chips best with "
    "mesh.fsdp of 4 or 8.",
    check=one_of("replicated", "data"),
    resume=YES,
  ),
  "model.name": Field("resnet", "Model family, of configs/families.py or package.module:Class."),
  "model.num_classes": Field(
    1000,
    "Classes of the head; 0 takes the number that the data have.",
    "classes",
    Check("2 or more, or 0 for as many as the data have", lambda v: v == 0 or v >= 2),
  ),
  "model.dtype": Field(
    "bfloat16",
    "Of activations; parameters and statistics are float32 or wider.",
    check=one_of("bfloat16", "float32", "float64"),
  ),
  "model.precision": Field(
    "default",
    "Of products of float32 on a TPU: default, factors are rounded to bfloat16, those of the head "
    "under model.dtype=bfloat16 too | high, three passes of bfloat16 | highest, float32 in six. A "
    "CPU always computes in float32.",
    check=one_of("default", "high", "highest"),
    resume=ASK,
  ),
  **data_fields.DATA,
  "optimizer.name": Field(
    "sgd", "An optimizer of trainer/optimizer.py, or package.module:function."
  ),
  "optimizer.schedule": Field(
    "cosine",
    "The learning rate over the run: a schedule of trainer/schedules.py with its options, as in "
    "'step(at=(30, 60, 80), factor=0.1)', or package.module:function.",
    resume=ASK,
  ),
  "optimizer.lr_per_256": Field(
    0.1,
    "Peak learning rate at batch 256; scaled linearly with the batch (arXiv:1706.02677). Exactly "
    "one of lr_per_256 and lr is positive.",
    "",
    at_least(0),
    ASK,
  ),
  "optimizer.lr": Field(0.0, "Peak learning rate at any batch.", "", at_least(0), ASK),
  "optimizer.final_lr_fraction": Field(
    0.0, "The schedule ends at this share of the peak.", "", between(0, 1), ASK
  ),
  "optimizer.warmup_epochs": Field(
    5.0,
    "Linear from warmup_start to the peak; at most one of the two.",
    "epochs",
    at_least(0),
    ASK,
  ),
  "optimizer.warmup_steps": Field(
    0, "Linear from warmup_start to the peak.", "steps", at_least(0), ASK
  ),
  "optimizer.warmup_start": Field(
    0.0,
    "Rate of the first step as a share of the peak; at 0 that step changes no weight.",
    "",
    between(0, 1),
    ASK,
  ),
  "optimizer.momentum": Field(0.9, "Of sgd, lars and rmsprop.", "", SHARE, ASK),
  "optimizer.nesterov": Field(True, "Of sgd.", resume=ASK),
  "optimizer.b1": Field(0.9, "Of adamw and lamb: decay of the first moment.", "", SHARE, ASK),
  "optimizer.b2": Field(0.999, "Of adamw and lamb: decay of the second moment.", "", SHARE, ASK),
  "optimizer.eps": Field(
    1e-8, "Of adamw: added to the root of the second moment.", "", POSITIVE, ASK
  ),
  "optimizer.mu_dtype": Field(
    "params",
    "Of adamw and lamb: of the first moment; params: that of the parameters.",
    check=one_of("params", "bfloat16"),
  ),
  "optimizer.lamb_eps": Field(
    1e-6, "Of lamb: added to the root of the second moment, as in timm.", "", POSITIVE, ASK
  ),
  "optimizer.lamb_clip_norm": Field(
    1.0,
    "Of lamb: norm that the gradient is clipped to inside of it, as in timm; 0 clips nothing.",
    "",
    at_least(0),
    ASK,
  ),
  "optimizer.eta": Field(
    0.001, "Of lars: trust coefficient, as in all entries of MLPerf.", "", POSITIVE, ASK
  ),
  "optimizer.rms_decay": Field(
    0.9, "Of rmsprop: decay of the squares (arXiv:1905.11946).", "", SHARE, ASK
  ),
  "optimizer.rms_eps": Field(
    1e-3, "Of rmsprop: inside the root, as in TensorFlow's EfficientNet.", "", POSITIVE, ASK
  ),
  "optimizer.weight_decay": Field(
    1e-4, "Share of the parameters; optimizer.decay says how it is taken off.", "", at_least(0), ASK
  ),
  "optimizer.decay": Field(
    "own",
    "own: sgd and rmsprop: coupled; adamw: decoupled; lamb and lars: part of the trust ratio | "
    "coupled: added to the gradient | decoupled: taken off the parameters, times the rate "
    "(arXiv:1711.05101) | scheduled: likewise, times the rate over its peak, as Composer and "
    "big_vision do.",
    check=one_of("own", "coupled", "decoupled", "scheduled"),
  ),
  "optimizer.decay_bn_and_bias": Field(
    False,
    "Whether vectors decay too: BN scales and all biases. With optimizer.no_decay, all parameters "
    "but those.",
  ),
  "optimizer.no_decay": Field(
    "",
    "Regular expression of further parameters that do not decay, searched for in their path, as in "
    "'stem_conv|head/bias'.",
    check=PATTERN,
  ),
  "optimizer.freeze": Field(
    "",
    "Regular expression of parameters that are not trained, searched for in their path, as in "
    "'^stem|^stage[12]'. A batch norm whose parameters all match computes with its running "
    "averages, which stay as they are.",
    check=PATTERN,
  ),
  "optimizer.lr_scales": Field(
    "",
    "Factors of the learning rate by parameter, PATTERN:FACTOR joined by commas, as in "
    "'^head/:10, ^stem:0.1': the first regular expression found in the path counts, else 1.",
    resume=ASK,
  ),
  "optimizer.clip_norm": Field(
    0.0, "Largest norm of the gradient of all parameters; 0 clips nothing.", "", at_least(0), ASK
  ),
  "optimizer.agc": Field(
    0.0,
    "Largest norm of the gradient of a unit over that of its weights (arXiv:2102.06171; there "
    "0.01); 0 clips nothing.",
    "",
    at_least(0),
    ASK,
  ),
  "optimizer.no_agc": Field(
    "^head/",
    "Regular expression of parameters that optimizer.agc leaves alone; '' for none.",
    check=PATTERN,
    resume=ASK,
  ),
  "optimizer.ema_decay": Field(
    0.0, "Of averaged weights, which evaluation then uses; 0 keeps none.", "", SHARE
  ),
  "optimizer.ema_rule": Field(
    "tf",
    "Decay of each update: tf: min(ema_decay, (1 + n) / (10 + n)) | constant | timm(gamma=1, "
    "power=0.667): see trainer/averages.py | package.module:function.",
    resume=ASK,
  ),
  "optimizer.ema_every_steps": Field(
    1, "Steps between updates of the averages.", "steps", at_least(1), ASK
  ),
  "optimizer.ema_start_epochs": Field(
    0.0, "Until then the averages are copies of the weights.", "epochs", at_least(0), ASK
  ),
  "optimizer.ema_batch_stats": Field(
    True, "Whether BN statistics are averaged too, or those of the last step taken.", resume=ASK
  ),
  **sparsity_fields.SPARSITY,
  "eval.batch_size": Field(
    1024,
    "Examples per step over all devices; the last batch is padded.",
    "examples",
    at_least(1),
    YES,
  ),
  "eval.every_epochs": Field(
    1.0,
    "At most one of the two; with neither only the end is evaluated.",
    "epochs",
    at_least(0),
    YES,
  ),
  "eval.every_steps": Field(0, "Steps between evaluations.", "steps", at_least(0), YES),
  "eval.flip": Field(
    False,
    "Evaluate the mean of the logits of an image and of its mirror (as FFCV does); takes twice the "
    "time of the model.",
    resume=YES,
  ),
  "eval.raw": Field(
    False,
    "Where weights are averaged (optimizer.ema_decay): evaluate the last ones too, as raw_top1, "
    "raw_top5 and raw_loss; the averaged ones decide which checkpoint is the best.",
    resume=YES,
  ),
  "eval.classes": Field(
    "all",
    "Whose logits count: all | data: those of the classes that the split has, as is usual for "
    "ImageNet-A and ImageNet-R, whose folders are 200 of the 1000.",
    check=one_of("all", "data"),
    resume=YES,
  ),
  "eval.per_class": Field(
    False,
    "Write the accuracy of each class, and the most frequent confusions, to "
    "WORKDIR/eval_classes.json.",
    resume=YES,
  ),
  "eval.real_labels": Field(
    "",
    "File of ReaL labels for the validation images of ILSVRC2012 (real.json, arXiv:2006.07159), "
    "local or gs://: adds real_top1 over the images that have any.",
    resume=YES,
  ),
  "eval.precise_bn_examples": Field(
    0,
    "Before an evaluation BN statistics are computed anew over so many training images, a fixed "
    "choice of them, and used for that evaluation only; a multiple of eval.batch_size; 0 is off. "
    "See trainer/evaluate.py.",
    "examples",
    at_least(0),
    YES,
  ),
  "checkpoint.every_epochs": Field(
    0.0,
    "At most one of the two; evaluated steps and the end are always saved.",
    "epochs",
    at_least(0),
    YES,
  ),
  "checkpoint.every_steps": Field(0, "Steps between checkpoints.", "steps", at_least(0), YES),
  "checkpoint.every_minutes": Field(
    10.0, "Time between checkpoints by the clock, besides; 0 is never.", "minutes", at_least(0), YES
  ),
  "checkpoint.keep_last": Field(
    3, "Newest checkpoints that stay.", "checkpoints", at_least(1), YES
  ),
  "checkpoint.keep_best": Field(
    True, "Whether the one with the highest top1 stays as well.", resume=YES
  ),
  "checkpoint.retry_seconds": Field(
    60.0, "Pause before a failed save is tried again.", "seconds", at_least(0), YES
  ),
  "checks.replicas_every_steps": Field(
    100,
    "Steps between comparisons of what several devices have copies of (trainer/replicas.py), which "
    "are made before every save too; 0 makes none at all.",
    "steps",
    at_least(0),
    YES,
  ),
  "checks.recompute_every_steps": Field(
    0,
    "Steps between tests in which all devices compute the gradient of the same examples, which "
    "finds one that multiplies wrong. Each takes about as long as a step, and is one more program "
    "to compile; 0 makes none.",
    "steps",
    at_least(0),
    YES,
  ),
  "resume.allow": Field(
    "",
    "Fields and sections that may differ from those of the checkpoint, joined by commas, as in "
    "'total_epochs,optimizer.lr_per_256' or 'optimizer'.",
    resume=YES,
  ),
  "pod.start_seconds": Field(300.0, "For all hosts to come up.", "seconds", at_least(1), YES),
  "pod.timeout_seconds": Field(
    45.0,
    "A host that is silent for longer is lost, and the others exit.",
    "seconds",
    at_least(1),
    YES,
  ),
  "pod.lease_seconds": Field(
    60.0,
    "A workdir whose owner on another machine gives no sign for longer may be taken over.",
    "seconds",
    at_least(1),
    YES,
  ),
  "pod.stuck_seconds": Field(
    1800.0,
    "A host that stays at one point for longer exits; compiling is one point.",
    "seconds",
    at_least(1),
    YES,
  ),
  "log.every_steps": Field(
    100, "Steps between progress lines and points of the curves.", "steps", at_least(1), YES
  ),
  "log.profile_step": Field(
    0, "First step of a profile for TensorBoard; 0 takes none.", "steps", at_least(0), YES
  ),
  "log.profile_steps": Field(5, "Length of the profile.", "steps", at_least(1), YES),
  "log.wandb": Field(
    "",
    "PROJECT or ENTITY/PROJECT of Weights & Biases that gets the scalars of metrics.jsonl as well; "
    "needs the extra [wandb]. '' for none.",
    resume=YES,
  ),
}

# Fields of config.model with which a ResNet with a max-pool computes the same in fewer cycles of a
# TPU, by estimate: launch/estimates.md.
SAVE_TIME = {"pool_first": True, "bn_together": True, "zeros_last": True}

# Durations that are given in epochs or in steps: X_epochs, X_steps.
DURATIONS = ("total", "optimizer.warmup", "eval.every", "checkpoint.every")


def get_config(family: str = "resnet") -> ml_collections.ConfigDict:
  """Return the defaults of a run: at first ResNet-50 on ImageNet at 224 px.

  Only `data.path` is left to be filled in.

  Args:
    family: model family, whose fields `config.model` then has beside those of all families.
  """
  config = to_config(all_fields(family))
  config.model.name = family
  return config


def all_fields(family: str) -> dict[str, Field]:
  """Return the fields of a run with a model of this family, by name as in "model.depth".

  Raises:
    ValueError: if there is no such family.
  """
  own = families.fields(family)
  merged: dict[str, Field] = {}
  for name, field in RUN.items():
    merged[name] = field
    if name == "model.precision":  # the last of the section
      merged |= {f"model.{key}": own_field for key, own_field in own.items()}
  return merged
