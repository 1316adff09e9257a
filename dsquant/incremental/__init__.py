"""A new release of a quantized model: what changed is quantized under the recorded scales, the rest is reused."""
