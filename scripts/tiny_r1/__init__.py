"""How the embedded model is made: corpus, tokenizer, network, training, outliers, FP8 export."""
