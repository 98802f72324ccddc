#!/usr/bin/env bash
# The recipe of the Qwen3 Embedding report: synthesis, curation, stage 1, mining, stage 2, merging, evaluation, export.
#
#     recipes/run.sh recipes/qwen3-embedding-0.6b WORK
#
# WORK holds passages.jsonl, personas.jsonl, labeled.jsonl and the evaluation folder dev (see recipes/README.md). Each
# step is skipped if its output is complete; an interrupted one continues. So after any failure, run the command again.
#
# BASE   the base model, instead of that of the folder       GPUS   ranks of a training run on this machine (default: 1)
# SEEDS  of the runs of stage 2 that are merged (default: "0 1 2")                      SUITE  mteb benchmark, optional
set -euo pipefail
if [ $# -ne 2 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; fi
common=$(cd "$(dirname "$0")" && pwd)
recipe=$(cd "$1" && pwd)
cd "$2"
for input in passages.jsonl personas.jsonl labeled.jsonl dev; do
  [ -e "$input" ] || { echo "$PWD/$input: missing; recipes/README.md says what it holds" >&2; exit 2; }
done

step() { printf '\n== %s\n' "$*"; }

train() { # CONFIG FOLDER OPTION...
  local config=$1 out=$2
  shift 2
  [ -d "$out/final" ] && return
  step "train $out"
  local launch=(pyqemb)
  [ "${GPUS:-1}" -gt 1 ] && launch=(torchrun --nproc-per-node "$GPUS" -m pyqemb)
  "${launch[@]}" train "$config" --set "save.dir=$out" --resume auto "$@"
}

curate() { # NAME
  [ -e "curated-$1/kept.jsonl" ] && return
  step "curate $1"
  pyqemb curate "$common/curation-$1.toml"
}

mine() { # PAIRS OUT
  [ -e "$2" ] && return
  step "mine $2"
  mkdir -p "$(dirname "$2")"
  pyqemb mine runs/stage1/final "$1" --out "$2" --k 7 --max-positive-ratio 0.95 --cache vectors
}

step synthesize
pyqemb synthesize "$common/synthesis.toml"
curate stage1
train "$recipe/stage1.toml" runs/stage1 ${BASE:+--set "model.base=$BASE"}

curate stage2
curate labeled
mine curated-labeled/kept.jsonl mined/labeled.jsonl
mine curated-stage2/kept.jsonl mined/synthetic.jsonl

runs=()
for seed in ${SEEDS:-0 1 2}; do
  train "$recipe/stage2.toml" "runs/stage2-$seed" --set "train.seed=$seed"
  runs+=("runs/stage2-$seed/final")
done
[ -d merged ] || { step merge; pyqemb merge "${runs[@]}" --out merged; }

step evaluate
pyqemb evaluate runs/stage1/final dev
pyqemb evaluate merged dev --json merged.json
[ -d exported ] || { step export; pyqemb export merged --out exported --verify; }
[ -z "${SUITE:-}" ] || { step "$SUITE"; pyqemb evaluate exported --suite "mteb:$SUITE" --json suite.json; }
