"""dsquant: quantization and conversion of DeepSeek-R1 and its family."""

__version__ = "0.1.0"
