"""What a layer for multi-token prediction has beside a decoder layer's parts (DeepSeek-V3 report, arXiv 2412.19437)."""

from dsquant.model.families.family import Config

NAMES = {
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
# By the first part of these names such a layer shows that it is not one decoder layer more.
PARTS = frozenset(name.split(".")[0] for name in NAMES)
# Those that are no norms; never quantized.
MATRICES = ("eh_proj", "shared_head.head", "embed_tokens")
DRAFT = "model.decoder"
"""What SGLang 0.5 calls the first such layer."""
COUNT_KEY = "num_nextn_predict_layers"
"""What configs call the number of such layers."""


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its weight."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    vectors = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    tables = dict.fromkeys(("embed_tokens", "shared_head.head"), (vocabulary, hidden))
    return {**vectors, **tables, "eh_proj": (hidden, 2 * hidden)}
