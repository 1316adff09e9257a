"""Writes the command that serves an output in its placement.

From the engines' documentation (November 2026): vLLM and SGLang divide attention heads among tensor-parallel ranks;
llama.cpp takes the first `-ot` pattern that matches a tensor's name; KTransformers keeps routed experts in RAM and the
rest in one GPU.
"""

import shlex

from dsquant.deployment.facts import ENGINE_SHARE, GPU_RESERVE_BYTES
from dsquant.deployment.hardware import Machine
from dsquant.deployment.placement import MachinePlacement, Network
from dsquant.deployment.sizes import SOURCE, OutputSize
from dsquant.deployment.subject import Subject
from dsquant.formats.gguf.rope import starting_options
from dsquant.formats.table import format_of


def launch_commands(
    output: OutputSize, network: Network, machine: Machine, placement: MachinePlacement, subject: Subject
) -> dict[str, str]:
    """Returns engine -> command for every engine that can run a placement, with the context that it was planned for."""
    if placement.kind == "none":
        return {}
    if output.placement == "parallel":
        return _parallel_commands(output, placement, placement.kv_bytes // network.kv_bytes_per_token)
    if output.placement == "unified":
        return {"mlx-lm": format_of(output.format).serve_command(output.folder)}
    options = starting_options(subject.skeleton.config["rope_parameters"])
    commands = {"llama.cpp": _llama_cpp(output, network, machine, placement, subject.name) + options}
    base = output.served_bytes - output.by_kind.get("routed experts", 0) + placement.kv_bytes
    holds_base = machine.gpus is not None and machine.gpus.memory_bytes - GPU_RESERVE_BYTES >= base
    if network.has_experts and network.shared_kv and holds_base and placement.kind == "split":
        experts = output.by_kind.get("routed experts", 0)
        if experts < machine.ram_bytes:
            commands["ktransformers"] = (
                f"python -m ktransformers.local_chat --model_path {subject.servable} --gguf_path {output.folder} "
                "--cpu_infer $(($(nproc) - 1)) --max_new_tokens 4096"
            )
    return commands


def _parallel_commands(output: OutputSize, placement: MachinePlacement, context: int) -> dict[str, str]:
    sizes = f"--tensor-parallel-size {placement.tensor_parallel}"
    if placement.pipeline_parallel > 1:
        sizes += f" --pipeline-parallel-size {placement.pipeline_parallel}"
    # bfloat16: float16 overflows in DeepSeek's deeper layers
    vllm = f"vllm serve {output.folder} {sizes} --dtype bfloat16 --max-model-len {context}"
    sglang = (
        f"python -m sglang.launch_server --model-path {output.folder} --tp {placement.tensor_parallel}"
        + (f" --pp-size {placement.pipeline_parallel}" if placement.pipeline_parallel > 1 else "")
        + f" --dtype bfloat16 --context-length {context}{sglang_options(output)}"
    )
    return {
        "vLLM": f"{vllm} --gpu-memory-utilization {ENGINE_SHARE}",
        "SGLang": f"{sglang} --mem-fraction-static {ENGINE_SHARE}",
    }


def sglang_options(output: OutputSize) -> str:
    """Returns what SGLang needs besides: 0.5.23 takes FP8 shared experts for 4-bit routed ones (decision 35)."""
    return " --disable-shared-experts-fusion" if output.fp8 and output.format != SOURCE else ""


def _llama_cpp(output: OutputSize, network: Network, machine: Machine, placement: MachinePlacement, name: str) -> str:
    file = shlex.quote(f"{name}-{output.format.removeprefix('gguf:')}.gguf")
    context = placement.kv_bytes // network.kv_bytes_per_token
    command = f"llama-server -m {output.folder}/{file} -c {context}"
    if placement.kind == "cpu":
        return f"{command} -ngl 0"
    if placement.kind in ("gpu", "unified"):
        return f"{command} -ngl 99"
    if not network.has_experts:
        return f"{command} -ngl {placement.gpu_layers}"
    assert machine.gpus is not None
    each = placement.gpu_layers // machine.gpus.count
    patterns = []
    for card in range(machine.gpus.count if each else 0):
        first = network.first_split + card * each
        layers = "|".join(str(layer) for layer in range(first, first + each))
        patterns.append(f"-ot 'blk\\.({layers})\\.ffn_.*_exps=CUDA{card}'")
    return " ".join([command, "-ngl 99", *patterns, "-ot 'ffn_.*_exps=CPU'"])
