#!/usr/bin/env bash
# torchrun with two processes on a machine without GPUs, without --use-cpu: both train alone into one folder.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh" "$1"
small
CUDA_VISIBLE_DEVICES= timeout 280 "$B/torchrun" --standalone --nproc-per-node 2 -m peagle_hf $TRAIN --data-path out --save-path ck --epochs 1 --optim adamw_torch >log 2>&1; rc=$?
if [ $rc = 0 ]; then
  n=$(py -c "import json; print(json.load(open('ck/0/training.json'))['processes'])")
  [ "$n" = 2 ] && right "two processes" || wrong "status 0, but each process trained alone (recorded: $n process)"
fi
grep -q "use.cpu" log && ! grep -q "use_cpu=False" log && right "says what to pass"
first=$(grep "peagle-hf train:" log | head -n 1 | grep -o "peagle-hf train:.*" | cut -c1-160)
p $TRAIN --data-path out --save-path ck --epochs 2 --optim adamw_torch
wrong "ended with: $first | and the next run with: $(last)"
