"""The model directory: weights, tokenizer and shape, by what the files' headers say."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.preflight import machine
from megatron_coreward.preflight.tokenizer import FileTokenizer, has_fast_tokenizer, read_json
from megatron_coreward.weights.mapping import hf_tensors

# Those for which vLLM 0.32 has attention kernels without a GPU (`CPUAttentionBackend.get_supported_head_sizes`).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def layout_problems(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """What engines without a GPU cannot compute; layouts are held against the model by `config.layout_rules`."""
    if not machine.joins_cluster() and not machine.visible_gpus() and arch.head_dim not in CPU_HEAD_SIZES:
        yield (
            f"model.hf_path: head_dim is {arch.head_dim}; without a GPU the rollout engine has kernels for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}"
        )


def weight_problems(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """What the headers of the weight files show: damage, and tensors that the architecture does not have."""
    if config.model.megatron_path is not None:
        yield from _megatron_problems(config.model.megatron_path)
        return
    try:
        found = _tensors(config.model.hf_path)
    except InputError as error:
        yield f"model.hf_path: {error}"
        return
    if not found:
        return  # there are no files, which was said already
    expected = hf_tensors(arch)
    if missing := [name for name in expected if name not in found]:
        yield f"model.hf_path: {len(missing)} tensors are missing in {config.model.hf_path}, first {missing[0]!r}"
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            yield (
                f"model.hf_path: tensor {name!r} has shape {found[name]}, {config.model.hf_path / 'config.json'} asks "
                f"for {shape}"
            )
            break
    unneeded = {"lm_head.weight"} if arch.tied else set()
    extra = [n for n in found if n not in expected and n not in unneeded and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        yield f"model.hf_path: {len(extra)} tensors have no place in a {arch.family} model, first {extra[0]!r}"


def _tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model directory; the library checks that each file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    index = path / INDEX
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError) as error:
            raise InputError(f"{index}: no index of safetensors files ({type(error).__name__}: {error})") from None
        if outside := [name for name in names if Path(name).name != name]:
            raise InputError(f"{index} names {outside[0]}, which is outside of the model's directory")
        files = [path / name for name in names]
    for match in filter(None, [_SHARD.fullmatch(file.name) for file in files]):
        files += [path / f"{match[1]}-{number:05d}-of-{match[3]}.safetensors" for number in range(1, int(match[3]) + 1)]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in dict.fromkeys(files):
        if not file.is_file():
            raise InputError(f"{file} is missing")
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    entry = tensors.get_slice(name)
                    if entry.get_dtype() not in DTYPES:
                        raise InputError(
                            f"{file}: tensor {name!r} has dtype {entry.get_dtype()}; supported: {', '.join(DTYPES)}"
                        )
                    shapes[name] = tuple(entry.get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: truncated or damaged, no whole safetensors file ({error})") from None
    if index.is_file() and (beside := sorted(set(path.glob("*.safetensors")) - set(files))):
        raise InputError(f"{beside[0]} lies beside the files that {INDEX} names; remove one or the other")
    return shapes


def _megatron_problems(path: Path) -> Iterator[str]:
    folder = next((f for f in (path, path / "megatron") if (f / "metadata.json").is_file()), None)
    if folder is None:
        return  # said already
    try:
        backend = read_json(folder / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            yield f"model.megatron_path: a checkpoint of format {backend!r} in {folder}; supported: torch_dist"
    except InputError as error:
        yield f"model.megatron_path: {error}"
    if not (folder / ".metadata").is_file():
        yield f"model.megatron_path: {folder / '.metadata'} is missing"
    if not any(folder.glob("*.distcp")):
        yield f"model.megatron_path: no *.distcp files in {folder}"


def tokenizer_problems(config: RunConfig, arch: Architecture | None) -> Iterator[str]:
    """Whether there is a tokenizer, whole, for this vocabulary, that can end an answer."""
    path = config.model.hf_path
    if not path.is_dir():
        return
    try:
        settings = {name: read_json(path / name) for name in ("config.json", "generation_config.json")}
    except InputError:
        settings = {}  # of config.json, which was said already
    try:
        words = read_json(path / "tokenizer_config.json")
    except InputError as error:
        yield f"model.hf_path: {error}"
        return
    for name, content in {**settings, "tokenizer_config.json": words}.items():
        if content.get("auto_map"):
            yield (
                f"model.hf_path: {path / name} has an auto_map, which asks for code of the model directory; such code "
                "is never run: remove the entry if the model works without"
            )
    if not has_fast_tokenizer(path):
        if not any((path / name).is_file() for name in ("vocab.json", "tokenizer.model")):
            yield f"model.hf_path: no tokenizer in {path} (tokenizer.json)"
        return
    try:
        tokenizer = FileTokenizer(path)
    except InputError as error:
        yield f"model.hf_path: {error}"
        return
    if arch is not None and tokenizer.num_ids > arch.vocab_size:
        yield (
            f"model.hf_path: the tokenizer has token ids up to {tokenizer.num_ids - 1}, the model's embedding "
            f"{arch.vocab_size} rows (vocab_size in config.json); allowed: a tokenizer of at most {arch.vocab_size}"
        )
    yield from _end_problems(path, settings, tokenizer)


def _end_problems(path: Path, settings: dict[str, dict[str, Any]], tokenizer: FileTokenizer) -> Iterator[str]:
    """Without an end-of-sequence token every rollout runs into its limit."""
    text = tokenizer.special.get("eos_token")
    if text is not None and tokenizer.token_id(text) is None:
        yield f"model.hf_path: eos_token {text!r} of {path / 'tokenizer_config.json'} is no token of tokenizer.json"
    if text is None and all(content.get("eos_token_id") is None for content in settings.values()):
        yield (
            f"model.hf_path: no end-of-sequence token in {path}; allowed: eos_token_id in generation_config.json or "
            "config.json, or eos_token in tokenizer_config.json"
        )
