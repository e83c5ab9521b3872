#!/usr/bin/env bash
# Startup script of the machine that `launch/tpu prepare` creates: makes the shards of ImageNet near the bucket.
# Its arguments are in the machine's metadata. The machine deletes itself when it is done or has failed; either way
# its log is in the bucket.
set -euo pipefail

metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/$1"
}

url="$(metadata attributes/prepare-url)"        # gs://BUCKET/FOLDER with code.tar.gz and arguments
source="$(metadata attributes/prepare-source)"  # gs://BUCKET/FOLDER with the archives
out="$(metadata attributes/prepare-out)"        # gs://BUCKET/FOLDER for the shards
name="$(metadata name)"
zone="$(metadata zone)"
data="${PREPARE_DATA:-/data}"
log="$data/prepare.log"
export HOME="$data"
mkdir -p "$data"/{archives,shards,code}

finish() {
  local code=$?
  echo "ended with code $code at $(date --iso-8601=seconds)" >>"$log"
  gcloud storage cp "$log" "$url/prepare.log" --quiet || true
  gcloud compute instances delete "$name" --zone="${zone##*/}" --quiet
}
trap finish EXIT

prepare() {
  apt-get update
  apt-get install --yes python3-venv
  gcloud storage cp "$url/code.tar.gz" "$data"/code.tar.gz --quiet
  gcloud storage cp "$url/arguments" "$data"/arguments --quiet
  tar --extract --file="$data/code.tar.gz" --directory="$data/code"
  python3 -m venv "$data"/tool
  "$data"/tool/bin/pip install --quiet --require-hashes --requirement="$data/code/launch/requirements-uv.lock"
  lock="$data/code/launch/requirements-tpu.lock"
  version="$(sed -n 's/^#.* --python-version[ =]\([0-9.]*\).*/\1/p' "$lock")" # of the command in its first lines
  "$data"/tool/bin/uv venv --quiet --python="$version" "$data"/venv
  "$data"/tool/bin/uv pip sync --quiet --python="$data/venv/bin/python" --require-hashes "$lock"
  # Shards of an earlier machine that was lost are kept, if their checksums are right.
  gcloud storage rsync "$out" "$data"/shards --recursive --quiet || true
  gcloud storage rsync "$source" "$data"/archives --recursive --quiet
  mapfile -t arguments <"$data"/arguments
  cd "$data"/archives
  PYTHONPATH="$data/code" "$data"/venv/bin/python -m input_pipeline.prepare --out "$data"/shards "${arguments[@]}"
  gcloud storage rsync "$data"/shards "$out" --recursive --quiet
}

prepare >>"$log" 2>&1
