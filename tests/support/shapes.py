"""Changes of `checkpoints.PICO_R1` that make a job's test cheap."""

# A dense layer and a mixture of four experts; the layer for multi-token prediction stays.
SMALLEST = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}

# The same half as wide: a search costs a third. No row of it is as long as a block of ggml's K types.
NARROW = SMALLEST | {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 64,
}  # fmt: skip
