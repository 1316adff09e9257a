"""The commands `dsquant generate` and `dsquant chat`."""

import sys
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.process import dsquant_command, model_argument, quiet_libraries
from dsquant.escaping import printable

if TYPE_CHECKING:
    from pydantic import BaseModel


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.evaluation.answer_request import AnswerOptions

    return (AnswerOptions,)


def _write(text: str) -> None:
    click.echo(printable(text), nl=False)


@click.command(cls=FieldsCommand, models=_models)
@model_argument
@click.argument("prompt", default="-", metavar="[PROMPT=-]")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it stands, instead of answering it.")
@dsquant_command
def generate(model: str, prompt: str, raw: bool, **options: Any) -> None:
    """Lets MODEL, in any format that dsquant reads, answer PROMPT; - is the standard input.

    The whole model is decoded to float32 in memory: this shows what it says, an engine serves it.
    """
    from dsquant.evaluation.answer_request import AnswerRequest

    request = AnswerRequest.checked(model=model, **options)
    if prompt == "-" and sys.stdin.isatty():
        click.echo("PROMPT, up to Ctrl-D:", err=True)
    text = sys.stdin.read() if prompt == "-" else prompt
    with quiet_libraries():
        from dsquant.evaluation.answers import resident

        with resident(request) as opened:
            if raw or not opened.tokenizer.chat_template:
                if not raw:
                    click.echo(f"{model} has no chat template: its text goes on, as with --raw", err=True)
                opened.go_on(text, _write)
            else:
                opened.answer([{"role": "user", "content": text}], _write)
    click.echo()


@click.command(cls=FieldsCommand, models=_models)
@model_argument
@dsquant_command
def chat(model: str, **options: Any) -> None:
    """Talks with MODEL, in any format that dsquant reads; an empty line or the end of the input ends it.

    The whole model is decoded to float32 in memory: this shows what it says, an engine serves it.
    """
    from dsquant.evaluation.answer_request import AnswerRequest

    request = AnswerRequest.checked(model=model, **options)
    messages: list[dict[str, str]] = []
    with quiet_libraries():
        from dsquant.evaluation.answers import resident

        with resident(request) as opened:
            opened.check_answers()
            while said := _asked():
                messages.append({"role": "user", "content": said})
                messages.append({"role": "assistant", "content": opened.answer(messages, _write)})
                click.echo()


def _asked() -> str:
    try:
        return str(click.prompt("you", default="", show_default=False, prompt_suffix="> ", err=True))
    except click.Abort:
        return ""
