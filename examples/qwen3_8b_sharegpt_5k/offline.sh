#!/usr/bin/env bash
# The tutorial's run: a drafter for Qwen3-8B from 5,000 ShareGPT chats, hidden states cached first, then five epochs, then
# acceptance in vLLM on 80 prompts of up to 256 tokens. After an interruption, run it again: it continues
# where it stopped.
#
# The tutorial of vLLM's speculators gives about 50 minutes on four H100 for its own such run, and these results on
# SpecBench: acceptance rate 13.35 %, acceptance length 1.53, by position 40.84, 10.84, 1.58, 0.15 %. The prompts here are
# others (examples/data/eval_prompts.jsonl); for a fair comparison name a file with SpecBench's prompts in PROMPTS.
#
# Not run with Qwen3-8B itself; the tests run it with SmolLM2-135M-Instruct and a few chats. docs/performance.md has the
# time of its parts at Qwen3-8B's sizes, from which the whole takes about 50 minutes on one H200 before the evaluation.
# On several GPUs: LAUNCH="torchrun --standalone --nproc-per-node 4 -m peagle_hf", by which they share the extraction and the
# training. Disk for Qwen3-8B: 32 KiB a token, so about 225 GiB for ShareGPT's lengths, and 21 GB an epoch.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)

MODEL=${MODEL:-Qwen/Qwen3-8B}
DATA=${DATA:-sharegpt}
PROMPTS=${PROMPTS:-$ROOT/examples/data/eval_prompts.jsonl}
OUTPUT=${OUTPUT:-output/peagle_qwen3_8b_sharegpt}
MAX_SAMPLES=${MAX_SAMPLES:-5000}
SEQ_LEN=${SEQ_LEN:-4096}
EPOCHS=${EPOCHS:-5}
LAUNCH=${LAUNCH:-peagle-hf}

peagle-hf prepare --model "$MODEL" --data "$DATA" --output "$OUTPUT" --max-samples "$MAX_SAMPLES" --seq-length "$SEQ_LEN"
$LAUNCH extract --model "$MODEL" --preprocessed-data "$OUTPUT" --validate-outputs
$LAUNCH train --verifier-name-or-path "$MODEL" --data-path "$OUTPUT" --save-path "$OUTPUT/checkpoints" \
    --num-layers 4 --num-depths 4 --down-sample-ratio 0.7 --down-sample-ratio-min 0.2 --no-norm-before-residual \
    --scheduler-type cosine --epochs "$EPOCHS" --lr 6e-4 --total-seq-len "$SEQ_LEN" --on-missing raise
peagle-hf evaluate --model "$OUTPUT/checkpoints/checkpoint_best" --suite "$PROMPTS" --max-tokens 256 --output "$OUTPUT"
