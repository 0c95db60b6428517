#!/usr/bin/env bash
# Transfer by every protocol on the real clips: makes docs/results.md out of result cards.
#   benchmarks/transfer.sh [REAL_DATA] [FOLDER]
# From nothing about four hours on one core with AMX, most of it training; stopped, it goes on where it was. A card that
# stands in FOLDER/cards is not made again. SEEDS="0" does with one seed.
set -euo pipefail
cd "$(dirname "$0")/.."
real=${1:-../shared/data/real}
out=${2:-transfer-out}
seeds=${SEEDS:-0 1}
bin=${BIN:-.venv/bin}
# Two processes of one thread each are faster here than two threads that wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

pretrained() { # RECIPE MANIFEST SEED: a run, unless it is there
  local run=$out/runs/$1-$3
  if [ -d "$run/checkpoints" ]; then
    "$bin/cmacc" pretrain --resume "$run"
  else
    "$bin/cmacc" pretrain --config "recipes/$1.yaml" --data.manifest "$out/data/$2.parquet" --seed "$3" --out "$run" \
      --overwrite # of a run that was stopped before its first checkpoint
  fi
}

card() { # NAME ENCODER ARGUMENTS...: a card, unless it is there
  [ -f "$out/cards/$1/card.json" ] ||
    "$bin/cmacc" evaluate "$2" --out "$out/cards/$1" --cache "$out/cache" "${@:3}"
}

[ -f "$out/data/pretrain.parquet" ] || "$bin/python" benchmarks/transfer_data.py "$real" "$out/data"
esc10=(--task esc10 --data "$real/esc50" --protocol svm linear knn)
card statistics-esc10 statistics "${esc10[@]}"
for seed in $seeds; do
  pretrained grid grid-digit "$seed"
  pretrained real pretrain "$seed"
  run=$out/runs/real-$seed
  card "real-$seed-esc10" "$run" "${esc10[@]}" --seed "$seed"
  ucf101=(--task ucf101 --allow-partial --splits 1 --data "$real/ucf101" --annotations "$real/splits/ucf101" --seed "$seed")
  card "real-$seed-ucf101" "$run" "${ucf101[@]}" --protocol linear knn retrieval
  card "real-$seed-pairs-ucf101" "$run" --task pairs --data "$out/data/ucf101-sounding.parquet"
  grid=$out/runs/grid-$seed
  card "grid-$seed-digit" "$grid" --task labelled --protocol linear knn --data "$out/data/grid-digit.parquet"
  card "grid-$seed-color" "$grid" --task labelled --protocol linear knn --data "$out/data/grid-color.parquet"
  card "grid-$seed-pairs-grid" "$grid" --task pairs --data "$out/data/grid-digit.parquet"
  card "real-$seed-finetune" "$run" "${ucf101[@]}" --protocol finetune
done
card statistics-digit statistics --task labelled --protocol linear knn --data "$out/data/grid-digit.parquet"
card statistics-color statistics --task labelled --protocol linear knn --data "$out/data/grid-color.parquet"
"$bin/python" benchmarks/transfer_table.py "$out/cards" docs/results.md
