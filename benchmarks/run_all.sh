#!/usr/bin/env bash
# All figures of docs/benchmarks.md, raw, into a folder: bash benchmarks/run_all.sh FOLDER
# About two hours on two cores. Nothing else may run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder for the raw figures}
mkdir -p "$out"
python=${PYTHON:-.venv/bin/python}
for dtype in bfloat16 float32; do
  contestants=stemtune,trl_head,hand
  [ "$dtype" = float32 ] && contestants=stemtune,trl,trl_head,hand
  "$python" benchmarks/sft.py --form windows --sequences 8 --dtype "$dtype" \
    --contestants "$contestants" --json "$out/windows-$dtype.json"
  "$python" benchmarks/sft.py --form multiturn --sequences 16 --dtype "$dtype" \
    --contestants stemtune,trl_head,hand --json "$out/multiturn-$dtype.json"
done
"$python" benchmarks/sft.py --data src/stemtune/starter/hamlet.jsonl --dtype bfloat16 \
  --contestants stemtune,trl_head,hand --json "$out/starter-windows-bfloat16.json"
for dtype in bfloat16 float32; do
  for work in rag ranked unshared; do
    contestants=stemtune,hand
    [ "$work" = rag ] && contestants=stemtune,hand,trl_head,trl
    groups=$([ "$work" = unshared ] && echo 2 || echo 1)
    "$python" benchmarks/dpo.py --work "$work" --groups "$groups" --dtype "$dtype" \
      --contestants "$contestants" --json "$out/dpo-$work-$dtype.json"
  done
  "$python" benchmarks/sft.py --form single --dtype "$dtype" \
    --contestants stemtune,hand --json "$out/single-$dtype.json"
done
"$python" benchmarks/memory.py --json "$out/memory.json"
"$python" benchmarks/dpo_memory.py --json "$out/dpo-memory.json"
"$python" benchmarks/curves.py --json "$out/curves-bfloat16.json"
