"""Changes of `checkpoints.PICO_R1` that make a job's test cheap."""

# A dense layer and a mixture of four experts; the layer for multi-token prediction stays.
SMALLEST = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
