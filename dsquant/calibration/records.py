"""What a record of a data set says: a text, or the messages of a conversation.

Understood are `text` and `content`; `messages` (roles and contents, as chat APIs take them, with tools) and ShareGPT's
`conversations` (`from` and `value`), both with an optional `system` beside them; a question and its answer in columns
of their own, Alpaca's `instruction`, `input` and `output` among them.
"""

import json
from collections.abc import Mapping
from typing import Any

from dsquant.errors import InputError

Message = dict[str, str]
"""`role` (system, user, assistant or tool), `content`, and perhaps the assistant's `reasoning_content`."""

TEXTS = ("text", "content")
DIALOGUES = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
ANSWERS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
EXPECTED = (
    "'text' or 'content', 'messages' or 'conversations', or a question with its answer "
    f"({', '.join(' and '.join(map(repr, pair)) for pair in ANSWERS)})"
)


def document_of(record: Any, where: str) -> str | list[Message]:
    """Returns the text or the messages in a record; raises InputError, naming `where`, if it has neither."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected an object with {EXPECTED}")
    for name in TEXTS:
        if isinstance(record.get(name), str):
            return str(record[name])
    for name in DIALOGUES:
        if isinstance(record.get(name), (list, tuple)):
            return _system(record) + [_message(turn, f"{where}: {name}[{i}]") for i, turn in enumerate(record[name])]
    for question, answer in ANSWERS:
        if isinstance(record.get(question), str) and isinstance(record.get(answer), str):
            return _system(record) + _exchange(record, question, answer)
    raise InputError(f"{where}: expected an object with {EXPECTED}; found {_listed(record)}")


def column_of(record: Any, column: str, where: str) -> Any:
    """Returns a column of a record; raises InputError, which lists those there are, where it is not one of them."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected an object with a column {column!r}, found {record!r:.80}")
    if column not in record:
        raise InputError(f"{where}: no column {column!r}; found {_listed(record)}")
    return record[column]


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:20])) or "nothing"


def _system(record: Mapping[str, Any]) -> list[Message]:
    system = record.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system else []


def _exchange(record: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    asked = [record[question], record.get("input")] if question == "instruction" else [record[question]]
    reply = {"role": "assistant", "content": str(record[answer])}
    if isinstance(record.get("reasoning"), str):
        reply["reasoning_content"] = record["reasoning"]
    content = "\n\n".join(part for part in asked if isinstance(part, str) and part)
    return [{"role": "user", "content": content}, reply]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: expected a message with 'role' and 'content', or with 'from' and 'value'")
    role = ROLES.get(str(turn.get("role", turn.get("from"))))
    if role is None:
        raise InputError(f"{where}: expected a 'role' out of {', '.join(ROLES)}; found {turn.get('role')!r}")
    message = {"role": role, "content": _content(turn, where)}
    if role == "assistant" and isinstance(turn.get("reasoning_content"), str):
        message["reasoning_content"] = turn["reasoning_content"]
    return message


def _content(turn: Mapping[str, Any], where: str) -> str:
    """A message's text, with the calls of tools behind it as JSON."""
    content = turn.get("content", turn.get("value"))
    called = turn.get("tool_calls") or ()
    if not isinstance(called, (list, tuple)):
        raise InputError(f"{where}: 'tool_calls' must be a list, found {called!r:.80}")
    calls = [json.dumps(call, ensure_ascii=False) for call in called]
    parts = content if isinstance(content, (list, tuple)) else [] if content is None and calls else [content]
    found = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise InputError(f"{where}: its content is no text (images and sound are not understood); leave the record out")
    return "\n".join([*texts, *calls])
