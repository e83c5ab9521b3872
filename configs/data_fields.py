"""The fields of `config.data`: where examples come from, and what happens to them on the host."""

from configs.fields import (
  ASK,
  COUNT_OR_AUTO,
  POSITIVE,
  SHARE,
  YES,
  Check,
  Field,
  Fields,
  at_least,
  one_of,
)

_THREE = Check("three numbers, for R, G and B", lambda v: len(v) == 3)
_THREE_POSITIVE = Check(
  "three positive numbers, for R, G and B", lambda v: len(v) == 3 and min(v) > 0
)
_AREA = Check("(min, max) in (0, 1]", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)
_ASPECT = Check("(min, max), both positive", lambda v: len(v) == 2 and 0 < v[0] <= v[1])

# What `data.allow`, and `--allow` of input_pipeline.prepare, may name.
FAULTS = ("empty_class", "deeper", "missing_file", "behind_end", "one_class")

DATA: Fields = {
  "data.path": Field(
    "",
    "Folder of shards (input_pipeline.prepare or TFDS), local, gs://, s3:// or http(s)://; or of "
    "class folders; or parquet: hf:NAME[:CONFIG][@REVISION] of the Hugging Face hub, or hf: and a "
    "folder, as in hf:gs://BUCKET/FOLDER.",
    resume=YES,
  ),
  "data.kind": Field(
    "auto",
    "array_record: a global shuffle of local shards | stream: of shards anywhere, in lanes | "
    "folder | hf | synthetic | auto: hf for hf:..., stream for a URL, else by what the folder "
    "holds | package.module:Class of a source of one's own.",
    resume=YES,
  ),
  "data.train_split": Field(
    "train", "Split that is trained on, or a part of it: train[:99%], train[1000:5000]."
  ),
  "data.eval_split": Field(
    "val",
    "Split that is evaluated, or several: in 'train[99%:], val' the first decides which checkpoint "
    "is the best.",
    resume=YES,
  ),
  "data.val_fraction": Field(
    0.0,
    "Of kind folder, where there is no split val: share of the images of each class that are held "
    "out of train as val.",
    "",
    SHARE,
  ),
  "data.val_seed": Field(
    0, "Of data.val_fraction: chooses which; an image stays where it is if others are added."
  ),
  "data.image_column": Field(
    "",
    "Column of the images in parquet, or feature of TFDS; '' takes the only one, or `image`.",
    resume=ASK,
  ),
  "data.label_column": Field(
    "",
    "Column of the labels in parquet, or feature of TFDS; '' takes the only one, or `label`.",
    resume=ASK,
  ),
  "data.class_order": Field(
    "natural",
    "How the class folders of kind folder are numbered: natural, in alphabetical order, but by "
    "value where all names are numbers | text, always alphabetical, as before this field existed.",
    check=one_of("natural", "text"),
    resume=YES,
  ),
  "data.allow": Field(
    "",
    "Faults of the data that are not refused, joined by commas: empty_class, a class without "
    "images in a split | deeper, images of a class in several folders | missing_file, gaps in "
    "numbered parquet files | one_class, data of a single class.",
    check=Check(
      f"names of {', '.join(FAULTS)}, joined by commas",
      lambda v: not v or all(word.strip() in FAULTS for word in v.split(",")),
    ),
    resume=YES,
  ),
  "data.image_size": Field(
    224, "Height and width of a training image.", "pixels", at_least(1), ASK
  ),
  "data.image_sizes": Field(
    "",
    "By epoch, instead of image_size: '0:128, 11:160, 13:192' is 160 px from epoch 11 on. Each "
    "size is compiled for itself, ahead of its first step; configs/image_sizes.py writes ramps.",
    "pixels",
    resume=ASK,
  ),
  "data.eval_image_size": Field(
    224,
    "The same in evaluation; a larger one than in training helps (arXiv:1906.06423).",
    "pixels",
    at_least(1),
    YES,
  ),
  "data.eval_resize": Field(
    256,
    "Shorter side before the centre crop of evaluation; 0 leaves the image as it is.",
    "pixels",
    at_least(0),
    YES,
  ),
  "data.eval_interpolation": Field(
    "bilinear",
    "Of this resize, antialiased: bilinear | bicubic.",
    check=one_of("bilinear", "bicubic"),
    resume=YES,
  ),
  "data.crop": Field(
    "random_resized",
    "random_resized: by crop_area and crop_aspect (arXiv:1409.4842) | padded: of image_size at a "
    "random place of the image and a black margin, as for CIFAR (arXiv:1512.03385) | none: the "
    "whole image.",
    check=one_of("random_resized", "padded", "none"),
    resume=ASK,
  ),
  "data.crop_padding": Field(
    4, "Width of the margin on each side, of crop padded.", "pixels", at_least(0), ASK
  ),
  "data.interpolation": Field(
    "bilinear",
    "Of the resize in training: bilinear, not antialiased and fast | bicubic, antialiased | "
    "random: one of the two for each image, as in timm.",
    check=one_of("bilinear", "bicubic", "random"),
    resume=ASK,
  ),
  "data.crop_area": Field(
    (0.08, 1.0), "Random-resized crop: share of the area of the image.", "", _AREA, ASK
  ),
  "data.crop_aspect": Field(
    (3 / 4, 4 / 3), "Random-resized crop: width over height, log-uniform.", "", _ASPECT, ASK
  ),
  "data.repeats": Field(
    1,
    "Augmented copies of an image in a row (arXiv:1901.09335). An epoch keeps its number of "
    "examples, so that it has that much fewer different ones.",
    "copies",
    at_least(1),
    ASK,
  ),
  "data.flip": Field(True, "Mirror half of the training images.", resume=ASK),
  "data.operations": Field(
    "",
    "Chain of operations of input_pipeline/augment on the host, after crop and flip, as in "
    "'solarize(p=0.2)|...'.",
    resume=ASK,
  ),
  "data.mean": Field(
    (123.675, 116.28, 103.53), "RGB, subtracted on the device.", "levels of 255", _THREE
  ),
  "data.std": Field(
    (58.395, 57.12, 57.375), "RGB, divided by on the device.", "levels of 255", _THREE_POSITIVE
  ),
  "data.workers": Field(
    -1,
    "Decoding processes; 0 decodes in threads of the trainer. -1: on 4 cores and more all but two "
    "of them, at most 32; on fewer none. `python -m input_pipeline.bench` measures.",
    "processes",
    COUNT_OR_AUTO,
    YES,
  ),
  "data.worker_restarts": Field(
    8,
    "Decoding processes that a host may replace, because they were killed, hung or ran out of "
    "memory; with one more the run saves and exits with 76.",
    "processes an hour",
    at_least(0),
    YES,
  ),
  "data.worker_timeout_seconds": Field(
    300.0,
    "A decoding process for whose batch the trainer waits longer, beyond "
    "data.stream_give_up_seconds, hangs: it is killed and replaced. If it is a thread of the "
    "trainer, the run saves and exits with 76.",
    "seconds",
    POSITIVE,
    YES,
  ),
  "data.threads": Field(
    -1,
    "Decoding threads of each process; 0 decodes when a batch is asked for. -1: 0 in processes, up "
    "to 2 in the trainer, and for kind hf one a core, at most 16.",
    "threads",
    COUNT_OR_AUTO,
    YES,
  ),
  "data.prefetch_batches": Field(
    4,
    "Batches that threads decode ahead in each process; without threads it is two.",
    "batches",
    at_least(1),
    YES,
  ),
  "data.stream_lanes": Field(
    64,
    "Lanes of a streamed order, see input_pipeline/order.py; must divide the batch, and be a "
    "multiple of the number of hosts, or blocks are read twice.",
    "lanes",
    at_least(1),
  ),
  "data.stream_block": Field(
    40, "Neighbouring records read by one request, at least.", "records", at_least(1)
  ),
  "data.stream_window": Field(
    8,
    "Blocks that a lane shuffles together: a batch mixes lanes x window blocks, and all hosts "
    "together hold as many in memory and somewhat more.",
    "blocks",
    at_least(1),
  ),
  "data.stream_ahead_steps": Field(
    8, "Steps whose blocks are asked for before they are needed.", "steps", at_least(1), YES
  ),
  "data.stream_requests": Field(
    32, "Blocks on their way at the same time, in each process.", "requests", at_least(1), YES
  ),
  "data.stream_timeout_seconds": Field(
    30.0, "Of one request, which is then sent anew.", "seconds", POSITIVE, YES
  ),
  "data.stream_hedge_seconds": Field(
    5.0, "After which a slow request gets a second one beside it.", "seconds", POSITIVE, YES
  ),
  "data.stream_give_up_seconds": Field(
    300.0, "Of one read with all its retries; then the run ends.", "seconds", POSITIVE, YES
  ),
  "data.hf_streams": Field(
    8,
    "Row groups that each host reads at once; see input_pipeline/sources/hf_stream.py.",
    "row groups",
    at_least(1),
  ),
  "data.hf_window": Field(
    4096,
    "Examples shuffled together; a host holds two windows in memory, 110 kB an image.",
    "examples",
    at_least(1),
  ),
  "data.max_bad_fraction": Field(
    0.001, "Undecodable records tolerated, as a share of an epoch.", "", SHARE, YES
  ),
  "data.synthetic_examples": Field(
    1024, "Size of each split of kind synthetic.", "examples", at_least(1)
  ),
}
