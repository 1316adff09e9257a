"""The pass that precedes the step `predictions`: gradients of what the original predicts, kept for every layer."""

from pathlib import Path

from dsquant.model.gradients import LayerStates
from dsquant.model.structure import DecoderLayer
from dsquant.pipeline.resume import check_files, kept_files
from dsquant.pipeline.run_state import Run
from dsquant.quantization.gradient_pass import GradientPass, take_back
from dsquant.quantization.layer import run_original
from dsquant.quantization.layer_job import LayerGradients, LayerJob
from dsquant.quantization.output_metrics import SAMPLES

# Under this the job notes the files.
GRADIENTS = "gradients"


def gradient_pass(run: Run, most_samples: int) -> GradientPass:
    """Returns the pass on a run's first samples."""
    source = run.source
    assert source.tokens_NT is not None

    def safe_point(done: int, total: int, what: str) -> None:
        run.safe_point("sensitivity", done, total, what)

    return GradientPass(
        source.skeleton,
        source.checkpoint.weights,
        source.tokens_NT[:most_samples],
        run.job.work,
        run.batch_samples,
        run.recipe.seed,
        safe_point,
        run.ranks,
    )


def keep_gradients(run: Run) -> None:
    """Brings the gradients of every layer to files of the work folder, where a step needs them.

    A resumed job keeps those it has. Raises InputError where hidden states are not finite, or files are damaged.
    """
    if not _wanted(run):
        return
    noted = run.ranks.once(lambda: run.job.notes.get(GRADIENTS))
    if noted:
        run.ranks.alone(lambda beat: check_files(run.job.work, noted, beat))
        return
    passing = gradient_pass(run, SAMPLES)

    def visit(job: LayerJob, states: LayerStates) -> None:
        outputs, attended = (passing.opened(path) for path in _paths(run, job.layer))
        first, end = job.shares.samples(job.ranks.rank)
        routing = run_original(job).routing
        for start in range(first, end):
            outputs.set_samples(start, states.gradients.samples(start, start + 1))
        take_back(job, states, routing)
        for start in range(first, end):
            attended.set_samples(start, states.attended.samples(start, start + 1))
        outputs.flush()
        attended.flush()

    hidden = passing.forwards()
    passing.backwards(hidden, passing.predict(hidden[-1]), visit)
    names = [path.name for layer in passing.layers for path in _paths(run, layer)]
    run.ranks.barrier()
    run.ranks.once(lambda: run.job.note(**{GRADIENTS: kept_files(run.job.work, names)}))


def gradients_of(run: Run, layer: DecoderLayer) -> LayerGradients | None:
    """Opens a layer's gradients; None where no step needs them, or it is one for multi-token prediction."""
    if not _wanted(run) or layer.index >= run.source.skeleton.num_layers:
        return None
    passing = gradient_pass(run, SAMPLES)
    return LayerGradients(*(passing.opened(path) for path in _paths(run, layer)))


def _wanted(run: Run) -> bool:
    return "predictions" in run.recipe.steps and bool(run.followed)


def _paths(run: Run, layer: DecoderLayer) -> tuple[Path, Path]:
    """Of the layer's outputs, and behind its attention."""
    work = run.job.work
    return work / f"gradients-{layer.index}.outputs", work / f"gradients-{layer.index}.attended"
