"""The command `dsquant eval`."""

import json
from pathlib import Path

import click

from dsquant.cli.process import dsquant_command, quiet_libraries
from dsquant.errors import GateError, InconclusiveError


@click.command("eval")
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE...")
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="Shipped text (code, wiki, reasoning) or text file; may be repeated.  [default: all shipped texts]",
)
@click.option(
    "--prompts",
    help="Prompts for code: python (shipped), a .jsonl file (also HumanEval's and MBPP's), or none.  [default: python, "
    "where the models fit in memory]",
)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a completion.")
@click.option("--execute", is_flag=True, help="Run the completions with the prompts' tests, and report pass@1.")
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Needed beside --execute: code that a model wrote will run on this machine, under limits that are no security "
    "boundary.",
)
@click.option(
    "--gates",
    type=click.Path(path_type=Path),
    help="YAML file of limits that decide the exit code; its form stands above.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for the report.")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="The most samples of each text.")
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the intervals' random draws.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--memory-budget",
    help="Most resident memory, such as 16GiB.  [default: 80 % of what is free, at most 16GiB]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@dsquant_command
def evaluate(
    reference: str,
    candidates: tuple[str, ...],
    texts: tuple[str, ...],
    prompts: str | None,
    max_tokens: int,
    execute: bool,
    allow_code_execution: bool,
    gates: Path | None,
    output: Path | None,
    samples: int,
    seq_len: int,
    seed: int,
    device: str,
    memory_budget: str | None,
    as_json: bool,
) -> None:
    """Measures what each CANDIDATE costs against REFERENCE: perplexity, KL divergence, routing, weights, code.

    Both are a folder, a hub id, tiny-r1, or a GGUF file: FP8, BF16, AWQ, compressed-tensors or GGUF of one model.
    With --gates the exit code is 4 where a gate failed, and 5 where none failed but more samples are needed.

    \b
    A file of gates:
      gates:
        - {metric: mean_kl, at_most: 0.02}
        - {metric: perplexity_ratio, text: code, at_most: 1.01}
        - {metric: top1_agreement, at_least: 0.95}
    at_most: mean_kl, mean_kl_reverse, perplexity_ratio (of a text or all);
      layer_error, weight_error, broken_layers; of code: code_bleu_drop,
      codebleu_drop, parse_rate_drop, loop_rate_rise, pass_rate_drop
    at_least: top1_agreement, top5_agreement (of a text or all);
      router_overlap; of code: code_exact_match, accuracy_retained,
      greedy_agreement
    """
    from dsquant.evaluation import comparison
    from dsquant.evaluation.code.drift_plan import DriftRequest
    from dsquant.evaluation.request import EvaluationRequest
    from dsquant.recipes import parse_size
    from dsquant.reporting.terminal import print_evaluation, progress_bar

    request = EvaluationRequest(
        reference=reference,
        candidates=candidates,
        texts=texts,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        drift=DriftRequest(prompts, max_tokens, execute, allow_code_execution),
        gates=gates,
        output=output,
        device=device,
        memory_budget=parse_size(memory_budget) if memory_budget is not None else None,
    )
    with quiet_libraries(), progress_bar(not as_json) as report:
        evaluation = comparison.evaluate(request, report)
    if as_json:
        click.echo(json.dumps(evaluation.as_json(), indent=2))
    else:
        print_evaluation(evaluation, output)
    try:
        comparison.raise_verdict(evaluation)
    except (GateError, InconclusiveError) as error:
        if as_json:
            raise
        raise type(error)(str(error).partition(":")[0]) from error  # which ones has been printed
