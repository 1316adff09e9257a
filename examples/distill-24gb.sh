#!/bin/sh
# A distill on one card of 24 GB. One calibration makes AWQ for vLLM and a GGUF file for llama.cpp; the report
# compares both with the original, which is read layer by layer and need not fit on the card.
set -e
model="${MODEL:-deepseek-ai/DeepSeek-R1-Distill-Qwen-14B}"
calibration="${CALIBRATION:-hub-r1}"

dsquant plan "$model" --gpu 1x24GiB --ram 64GiB
dsquant awq "$model" --to awq --to gguf:Q4_K_M --calibration "$calibration" --samples 128 --seq-len 2048 \
    --gpu-memory-budget 20GiB --no-evaluate --resume --output distill "$@"
dsquant eval "$model" distill/awq distill/gguf --samples 4 --seq-len 256 --prompts none --output distill-report

# vllm serve distill/awq --dtype bfloat16 --max-model-len 32768
# llama-server --model distill/gguf/*.gguf --n-gpu-layers 99
