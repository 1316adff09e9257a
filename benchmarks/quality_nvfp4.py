"""NVFP4's weights by dsquant, llm-compressor and ModelOpt side by side, as `benchmarks.quality` compares integers.

    python -m benchmarks.quality_nvfp4 MODEL... --text FILE --wiki FILE --work DIR --peers DIR [--seeds 0 1]

Its options are those of `benchmarks.quality`: the same tokens, the same evaluator, results that are kept. Every linear
of the decoder but router and head is in NVFP4. Methods whose names end in `inputs` are W4A4: their activations are
rounded as vLLM rounds them (`benchmarks/peers/rounded_inputs.py`), those of all others are not.
`benchmarks/peers/make_environments DIR llmcompressor modelopt` makes the peers' environments.
"""

from benchmarks.quality import Bench, conditions, parse, table, tell
from benchmarks.quality_methods import AWQ, Method

LLM_COMPRESSOR = ("--scheme", "NVFP4A16")
INPUTS = ("--activations", "fp4")
DSQUANT = (*AWQ, "--to", "nvfp4", "--rest", "bf16", "--preset", "compact")
METHODS = [
    Method("llmcompressor-nvfp4", "llm-compressor NVFP4A16", "llmcompressor", (*LLM_COMPRESSOR, "--no-awq")),
    Method("llmcompressor-nvfp4-awq", "llm-compressor AWQ, NVFP4A16", "llmcompressor", LLM_COMPRESSOR),
    Method(
        "llmcompressor-nvfp4-gptq", "llm-compressor GPTQ, NVFP4A16", "llmcompressor",
        (*LLM_COMPRESSOR, "--no-awq", "--gptq"),
    ),
    Method(
        "llmcompressor-nvfp4-awq-gptq", "llm-compressor AWQ + GPTQ, NVFP4A16", "llmcompressor",
        (*LLM_COMPRESSOR, "--gptq"),
    ),
    Method("modelopt-nvfp4", "ModelOpt W4A16_NVFP4", "modelopt"),
    Method("modelopt-nvfp4-search", "ModelOpt, scales by local_hessian", "modelopt", ("--search",)),
    Method("dsquant-nvfp4-none", "dsquant, no steps: plain rounding", None, (*DSQUANT, "--steps", "none")),
    Method("dsquant-nvfp4-compact", "dsquant compact", None, DSQUANT),
    Method("dsquant-nvfp4-best", "dsquant best", None, (*DSQUANT, "--preset", "best")),
    Method(
        "llmcompressor-nvfp4-inputs", "llm-compressor NVFP4 (W4A4)", "llmcompressor", ("--scheme", "NVFP4", "--no-awq")
    ),
    Method("modelopt-nvfp4-inputs", "ModelOpt NVFP4 (W4A4)", "modelopt", ("--inputs",)),
    Method("dsquant-nvfp4-none-inputs", "dsquant, no steps, W4A4", None, (*DSQUANT, *INPUTS, "--steps", "none")),
    Method("dsquant-nvfp4-compact-inputs", "dsquant compact, W4A4", None, (*DSQUANT, *INPUTS)),
]  # fmt: skip


def main() -> None:
    """Measures every model seed by seed, and prints the tables."""
    arguments = parse()
    methods = [one for one in METHODS if not arguments.methods or one.name in arguments.methods]
    benches = [Bench(model, arguments) for model in arguments.models]
    told = conditions(arguments, methods).partition("\n")[2]  # its first line is of integers
    for seed in [] if arguments.only_report else arguments.seeds:
        for bench in benches:
            for method in methods:
                try:
                    bench.result(method, seed)
                except RuntimeError as error:
                    tell(f"{bench.model.name}, {method.label}, seed {seed}: {error}")
    first = "- NVFP4 weights, every linear of the decoder but the router and lm_head; bits: stored for each weight."
    text = "\n\n".join([f"{first}\n{told}", *(table(bench, methods, arguments.seeds) for bench in benches)]) + "\n"
    if arguments.write:
        arguments.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
