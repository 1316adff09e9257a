"""The command `dsquant eval`."""

from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.process import dsquant_command, echo_json, json_option, quiet_libraries
from dsquant.errors import GateError, InconclusiveError

if TYPE_CHECKING:
    from pydantic import BaseModel


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.evaluation.request import EvaluationRequest

    return (EvaluationRequest,)


@click.command("eval", cls=FieldsCommand, models=_models)
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE...")
@json_option
@dsquant_command
def evaluate(as_json: bool, **options: Any) -> None:
    """Measures what each CANDIDATE costs against REFERENCE: perplexity, KL divergence, routing, weights, code,
    tasks.

    Both are a folder, a hub id, tiny-r1, or a GGUF file: one model as FP8 or BF16, or in any format of dsquant.
    With --gates the exit code is 4 where a gate failed, and 5 where none failed but more samples are needed.

    \b
    A file of gates:
      gates:
        - {metric: mean_kl, at_most: 0.02}
        - {metric: perplexity_ratio, text: code, at_most: 1.01}
        - {metric: top1_agreement, at_least: 0.95}
    at_most: mean_kl, mean_kl_reverse, perplexity_ratio (of a text or all);
      task_drop (of a task or all, such as task: arc_easy);
      layer_error, weight_error, broken_layers; of code: code_bleu_drop,
      codebleu_drop, parse_rate_drop, loop_rate_rise, pass_rate_drop
    at_least: top1_agreement, top5_agreement (of a text or all);
      router_overlap; of code: code_exact_match, accuracy_retained,
      greedy_agreement
    """
    from dsquant.evaluation.request import EvaluationRequest

    request = EvaluationRequest.checked(**options)
    from dsquant.evaluation import comparison
    from dsquant.jobs.ranks import joined
    from dsquant.reporting.terminal import print_evaluation, progress_bar

    with joined() as ranks, quiet_libraries(), progress_bar(not as_json and ranks.first) as report:
        evaluation = comparison.evaluate(request, report, ranks)
    if ranks.first and as_json:
        echo_json(evaluation)
    elif ranks.first:
        print_evaluation(evaluation, request.output)
    try:
        comparison.raise_verdict(evaluation)
    except (GateError, InconclusiveError) as error:
        if as_json:
            raise
        raise type(error)(str(error).partition(":")[0]) from error  # which ones has been printed
