"""The command line: options become a recipe, and one call. Imports no torch until a command runs."""

try:
    import os

    import click

    from dsquant import __version__
    from dsquant.cli.awq import awq
    from dsquant.cli.delta import delta
    from dsquant.cli.ending import Group
    from dsquant.cli.evaluate import evaluate
    from dsquant.cli.generate import chat, generate
    from dsquant.cli.gguf import gguf
    from dsquant.cli.inspect import inspect
    from dsquant.cli.plan import plan
    from dsquant.cli.run import run
    from dsquant.cli.verify import verify
except KeyboardInterrupt:  # where Python spends the first moments of every command
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second of two
    raise SystemExit(75) from None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dsquant")
def main() -> None:
    """Quantizes DeepSeek-R1 and its family: streamed from disk, resumable, measured against the original.

    \b
    Exit codes:
      0   done
      2   wrong usage
      3   bad input (no output), damage found (verify), or the output folder is
          locked by another run
      4   a gate failed
      5   inconclusive: no gate failed, but more samples are needed, or a
          check could not be run (verify)
      75  stopped but resumable (SIGTERM, SIGHUP, SIGINT, disk full, memory
          budget exceeded)
    """
    # Before transformers is imported: it warns of keys that dsquant itself obeys (attn_factor), once for each reading.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for command in (awq, gguf, evaluate, inspect, plan, run, verify, delta, generate, chat):
    main.add_command(command)
