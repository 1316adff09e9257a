"""How a command runs: what happens to earlier work, and where progress is published."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dsquant.options import Options, Spelling


class Again(Options):
    """What happens to a job that the output folder already holds."""

    resume: Annotated[bool, Spelling("--resume")] = Field(
        default=False, description="Continue an interrupted job in the output folder, or start one."
    )
    restart: Annotated[bool, Spelling("--restart")] = Field(
        default=False, description="Start over where the output folder holds a job or a result of dsquant."
    )


class Push(Options):
    """Where a finished output goes."""

    push_to: Annotated[str | None, Spelling(metavar="ORG/NAME")] = Field(
        default=None,
        description="Upload the finished output to this repository of the hub, made private where it is not there.",
    )


class DeltaOptions(Again):
    """What `dsquant delta` takes besides releases and output."""

    quantized: Annotated[
        Path | None, Spelling(default="where `dsquant awq OLD` puts it; OLD itself may be the output")
    ] = Field(default=None, description="The output created from OLD.")
    patch: Annotated[Path | None, Spelling(default="OUTPUT.patch")] = Field(default=None, description="Patch to write.")


class Metrics(Options):
    """Where a running job publishes its progress to other programs."""

    metrics_port: int | None = Field(default=None, ge=1, le=65535, description="Serve Prometheus metrics on this port.")
    metrics_address: Annotated[str | None, Spelling(default="127.0.0.1")] = Field(
        default=None,
        description="Serve them on this address; 0.0.0.0 is every network that this machine is in.",
    )
    metrics_file: Path | None = Field(
        default=None,
        description="Write metrics for node_exporter's textfile collector; the name ends in .prom.",
    )
