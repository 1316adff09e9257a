#!/bin/sh
# R1 for vLLM and SGLang on a node of 8 GPUs, one process for each. They share the work and write the bytes that one
# would write; where one is lost, start this script again: --resume continues.
set -e
model="${MODEL:-deepseek-ai/DeepSeek-R1}"
calibration="${CALIBRATION:-hub-r1}"

accelerate launch --num_processes "${PROCESSES:-8}" -m dsquant.cli awq "$model" --preset quality \
    --to awq --to compressed-tensors --calibration "$calibration" --samples 512 --seq-len 2048 \
    --memory-budget 24GiB --no-evaluate --resume --output r1-4bit "$@"
cat > r1-gates.yaml <<'GATES'
gates:
  - {metric: broken_layers, at_most: 0}
  - {metric: mean_kl, at_most: 0.1}
GATES
dsquant eval "$model" r1-4bit/awq r1-4bit/compressed-tensors --samples 4 --seq-len 256 --prompts none \
    --gates r1-gates.yaml --output r1-report

# vllm serve r1-4bit/awq --tensor-parallel-size 8 --dtype bfloat16
