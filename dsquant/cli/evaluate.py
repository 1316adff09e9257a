"""The command `dsquant eval`."""

import json

import click

from dsquant.cli.process import dsquant_command, quiet_libraries


@click.command("eval")
@click.argument("reference")
@click.argument("candidate")
@click.option("--text", "texts", multiple=True, help="Text file; may be repeated.  [default: shipped held-out texts]")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="Samples of each text.")
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@dsquant_command
def evaluate(reference: str, candidate: str, texts: tuple[str, ...], samples: int, seq_len: int, as_json: bool) -> None:
    """Measures how far CANDIDATE is from REFERENCE: perplexity, KL divergence, top-1 agreement."""
    from dsquant import comparison
    from dsquant.display import print_evaluation, progress_bar

    with quiet_libraries(), progress_bar(not as_json) as report:
        evaluation = comparison.evaluate(reference, candidate, list(texts), seq_len, samples, report)
    if as_json:
        click.echo(json.dumps(evaluation.as_json(), indent=2))
    else:
        print_evaluation(evaluation)
