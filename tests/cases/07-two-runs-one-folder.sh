#!/usr/bin/env bash
# Two trainings into one --save-path at the same time: one of them must be refused.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh" "$1"
fixture <<'PY'
import mk; mk.verifier("T"); mk.chats("d.jsonl", 240)
PY
must prepare --model T --data d.jsonl --output out --seq-length 256
must extract --model T --preprocessed-data out
T2="train --verifier-name-or-path T --data-path out --num-layers 1 --num-depths 3 --total-seq-len 48 --logging-steps 1 --epochs 4 --save-path ck"
"$B/peagle-hf" $T2 --lr 1e-3 >a.log 2>&1 & A=$!
for i in $(seq 200); do grep -q "'loss'" a.log && break; sleep 0.5; done
"$B/peagle-hf" $T2 --lr 2e-3 >b.log 2>&1; b=$?
wait $A; a=$?
grep -h -q Traceback a.log b.log && wrong "traceback (status $a, $b)"
{ [ $a = 0 ] && [ $b = 0 ]; } || right "one was refused (status $a, $b)"
wrong "both ended with 0; the one epoch folder holds the run with $(py -c "import json; print(json.load(open('ck/0/training.json'))['optimizer'])"), the other run's drafter is gone"
