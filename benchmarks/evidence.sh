#!/usr/bin/env bash
# The CPU part of docs/evidence.md: ablations of recipes/ablations, and the tables that the page is written from.
#   benchmarks/evidence.sh [REAL_DATA] [FOLDER]      (or: make evidence)
# About an hour on two cores with AVX2; stopped, it goes on where it was.
# Without REAL_DATA the real clips are skipped, with a message.
set -euo pipefail
cd "$(dirname "$0")/.."
real=${1:-../shared/data/real}
out=${2:-evidence-out}
workers=${WORKERS:-2}
bin=${BIN:-.venv/bin}
export OMP_NUM_THREADS=1

ablate() { # RECIPE FOLDER ARGUMENTS...
  "$bin/cmacc" ablate "recipes/ablations/$1.yaml" --out "$out/$2" --workers "$workers" "${@:3}"
  # One folder serves several plans, so that they share runs: each keeps its own page and tables.
  mkdir -p "$out/tables"
  for file in table.md differences.parquet metrics.parquet ablation.html; do cp "$out/$2/$file" "$out/tables/$1-$file"; done
}

ablate choosing vectors
ablate choosing-keys vectors
ablate choosing-clips rendered
if [ -d "$real" ]; then
  [ -f "$out/data/sounding.parquet" ] || "$bin/python" benchmarks/evidence_data.py "$real" "$out/data"
  ablate choosing-grid grid --data "$out/data/grid.parquet"
  ablate choosing-sounding sounding --data "$out/data/sounding.parquet"
else
  echo "skipped: the real clips, which are not in $real" >&2
fi
"$bin/python" benchmarks/evidence_table.py "$out/tables" --out "$out/evidence-cpu.json"
