#!/usr/bin/env bash
# Two processes, then one: half an epoch is trained twice and the first run's epoch folder replaced.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh" "$1"
small
T2="$TRAIN --data-path out --save-path ck --optim adamw_torch --use-cpu true"
"$B/torchrun" --standalone --nproc-per-node 2 -m peagle_hf $T2 --epochs 1 >log 2>&1 || { echo "fixture: $(last)"; exit 2; }
before=$(sha ck/0/model.safetensors)
p $T2 --epochs 2
refused && right "refused: $(last)"
[ $rc = 0 ] || wrong "traceback: $(last)"
py - <<'PY'
import json
s = json.load(open("ck/1/trainer_state.json"))
print("validated at (step, epoch):", [(x["step"], x["epoch"]) for x in s["log_history"] if "eval_loss" in x])
PY
[ "$before" = "$(sha ck/0/model.safetensors)" ] && right "epoch 0 is kept"
grep -qi "process" log && right "it says that the number of processes differs"
wrong "went on in the middle of epoch 0, trained half of it twice and replaced epoch folder 0, without a word"
