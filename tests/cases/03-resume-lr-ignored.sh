#!/usr/bin/env bash
# A resumed run is given another --lr and schedule: it must obey, refuse, or say that it does not.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh" "$1"
small
must $TRAIN --data-path out --save-path ck --epochs 2
p $TRAIN --data-path out --save-path ck --epochs 3 --lr 1e-5 --scheduler-type constant
refused && right "refused: $(last)"
[ $rc = 0 ] || wrong "traceback: $(last)"
grep -v "'learning_rate'" log | grep -qi "learning.rate\|--lr" && right "it says something about the rate"
py - <<'PY'
import json, sys
s = json.load(open("ck/2/trainer_state.json")); r = json.load(open("ck/2/training.json"))
rates = [x["learning_rate"] for x in s["log_history"] if x["step"] > 13 and "learning_rate" in x]
print("asked for 1e-05, trained with", sorted(set(rates)), "- recorded for the card:", r["optimizer"])
sys.exit(max(rates) > 1.01e-5)
PY
[ $? = 0 ] && right "the new rate is used" || wrong "--lr is ignored without a word"
