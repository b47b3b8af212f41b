#!/usr/bin/env bash
# The tutorial's run online: like offline.sh, but training asks a vLLM server for the hidden states, so that none are
# cached on disk. The server uses SERVER_GPUS, training uses TRAIN_GPUS; acceptance is measured after both.
#
# Not run with Qwen3-8B. offline.sh says what to compare the result with.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)

MODEL=${MODEL:-Qwen/Qwen3-8B}
DATA=${DATA:-sharegpt}
PROMPTS=${PROMPTS:-$ROOT/examples/data/eval_prompts.jsonl}
OUTPUT=${OUTPUT:-output/peagle_qwen3_8b_sharegpt_online}
MAX_SAMPLES=${MAX_SAMPLES:-5000}
SEQ_LEN=${SEQ_LEN:-4096}
EPOCHS=${EPOCHS:-5}
LAUNCH=${LAUNCH:-peagle-hf}
PORT=${PORT:-8000}
SERVER_GPUS=${SERVER_GPUS:-0}
TRAIN_GPUS=${TRAIN_GPUS:-1}

peagle-hf prepare --model "$MODEL" --data "$DATA" --output "$OUTPUT" --max-samples "$MAX_SAMPLES" --seq-length "$SEQ_LEN"

CUDA_VISIBLE_DEVICES=$SERVER_GPUS peagle-hf launch-vllm "$MODEL" --hidden-states-path "$OUTPUT/hidden_states" \
    -- --port "$PORT" --max-model-len "$((SEQ_LEN + 1))" &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null || true; wait "$SERVER" || true' EXIT
until curl --silent --fail --output /dev/null "http://localhost:$PORT/health"; do
    kill -0 "$SERVER" || { echo "vLLM ended before it was ready; its output above says why." >&2; exit 1; }
    sleep 2
done

CUDA_VISIBLE_DEVICES=$TRAIN_GPUS $LAUNCH train --verifier-name-or-path "$MODEL" --data-path "$OUTPUT" \
    --save-path "$OUTPUT/checkpoints" --on-missing generate --vllm-endpoint "http://localhost:$PORT/v1" \
    --num-layers 4 --num-depths 4 --down-sample-ratio 0.7 --down-sample-ratio-min 0.2 --no-norm-before-residual \
    --scheduler-type cosine --epochs "$EPOCHS" --lr 6e-4 --total-seq-len "$SEQ_LEN"

kill "$SERVER" && wait "$SERVER" || true
peagle-hf evaluate --model "$OUTPUT/checkpoints/checkpoint_best" --suite "$PROMPTS" --max-tokens 256 --output "$OUTPUT"
