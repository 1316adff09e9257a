"""Opens the model of a plan without reading a weight."""

import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsquant.deployment.planned import planned_checkpoint
from dsquant.deployment.sample import Sample, sample_of
from dsquant.files.foreign import find_file
from dsquant.formats.checkpoints import checkpoint_of, open_checkpoint
from dsquant.model.complete import check_complete
from dsquant.model.kinds import kind_of
from dsquant.model.skeleton import Skeleton
from dsquant.pipeline.inputs import check_unquantized
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint, read_config, read_config_file
from dsquant.source.hub import fetch_headers
from dsquant.source.locate import EMBEDDED_MODEL, locate
from dsquant.source.shards import INDEX_FILE, SINGLE_FILE


@dataclass(frozen=True)
class Subject:
    """A model known from headers, or from config.json alone."""

    model: str
    """As the user gave it."""
    checkpoint: Checkpoint
    skeleton: Skeleton
    has_headers: bool
    """False where everything is derived from config.json."""

    @cached_property
    def sample(self) -> Sample:
        """One layer of each kind."""
        return sample_of(self.checkpoint, self.skeleton)

    @cached_property
    def source_bytes(self) -> int:
        """Tensor data of the source."""
        return self.checkpoint.index.num_bytes

    @cached_property
    def num_weights(self) -> int:
        """Weights of all tensors."""
        return sum(math.prod(self.checkpoint.weights.shape(name)) for name in self.checkpoint.weights)

    @cached_property
    def active_weights(self) -> int:
        """Weights that a token meets: the routed experts' share, and an embedding only where it is the head too."""
        sizes, weights = self.skeleton.sizes, self.checkpoint.weights
        kinds: Counter[str] = Counter()
        for name in weights:
            kinds[kind_of(name, self.skeleton.num_layers)] += math.prod(weights.shape(name))
        routed = kinds.pop("routed experts", 0)
        idle = kinds["MTP"] + (kinds["embedding"] if kinds["head"] else 0)
        return kinds.total() - idle + (routed * sizes.experts_per_token // sizes.num_experts if routed else 0)

    @property
    def name(self) -> str:
        """Name for files."""
        path = Path(self.model).expanduser()
        return path.resolve().parent.name if path.is_file() else path.name

    @property
    def argument(self) -> str:
        """The model argument of dsquant's other commands: for a config.json its folder, where the weights belong."""
        path = Path(self.model).expanduser()
        return shlex.quote(str(path.parent) if path.is_file() else self.model)

    @property
    def calibration(self) -> str:
        """The option of dsquant's other commands for texts of reasoning; the embedded model has its own."""
        return "" if self.model == EMBEDDED_MODEL else " --calibration hub-r1"

    @property
    def servable(self) -> str:
        """The model argument of an engine, which knows no embedded model."""
        return shlex.quote(str(self.checkpoint.folder)) if self.model == EMBEDDED_MODEL else self.argument

    @property
    def has_tokenizer(self) -> bool:
        """Whether GGUF files can be planned to the byte: they hold the tokenizer."""
        return find_file(self.checkpoint.folder, "tokenizer.json") is not None


def open_subject(model: str) -> Subject:
    """Opens a model from its headers or its config: `tiny-r1`, a folder, a config.json (or a folder with only that), a
    hub id. Raises InputError where it cannot be found, is damaged, already quantized or not supported."""
    path = Path(model).expanduser()
    if path.is_file():
        return _from_config(model, path.parent, path)
    if path.is_dir() or model == EMBEDDED_MODEL or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        folder = locate(model)
        if not any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
            return _from_config(model, folder, folder / CONFIG_FILE)
        return _from_headers(model, open_checkpoint(folder))
    folder, index = fetch_headers(model)
    if index is None:
        return _from_config(model, folder, folder / CONFIG_FILE)
    return _from_headers(model, checkpoint_of(folder, read_config(folder), index))


def _from_config(model: str, folder: Path, path: Path) -> Subject:
    checkpoint, skeleton = planned_checkpoint(folder, read_config_file(path))
    return Subject(model, checkpoint, skeleton, has_headers=False)


def _from_headers(model: str, checkpoint: Checkpoint) -> Subject:
    check_unquantized(checkpoint)
    skeleton = Skeleton(checkpoint)
    check_complete(checkpoint, skeleton)
    return Subject(model, checkpoint, skeleton, has_headers=True)
