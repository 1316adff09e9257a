#!/bin/sh
# R1 for llama.cpp on a machine with 512 GB of memory and no GPU. Attention, shared experts and dense layers stay at
# 8 bits, the routed experts get 4: 384 GiB, which leaves room for the context.
set -e
model="${MODEL:-deepseek-ai/DeepSeek-R1}"
calibration="${CALIBRATION:-hub-r1}"

dsquant plan "$model" --ram 512GiB
dsquant gguf "$model" --type Q4_K_M+ --split-max-size 48GiB --calibration "$calibration" --device cpu \
    --memory-budget 64GiB --no-evaluate --resume --output r1-gguf "$@"
dsquant verify r1-gguf

# llama-server finds the other files by the first: llama-server --model r1-gguf/*-00001-of-*.gguf --ctx-size 16384
