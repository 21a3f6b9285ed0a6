"""The files of a question set on the Hugging Face hub, fetched to the local cache."""

from pathlib import Path

from megatron_coreward.data.sources import DataSource
from megatron_coreward.errors import InputError


def fetch(source: DataSource, split: str) -> list[Path]:
    """Local paths of a split's parquet or JSON-lines files.

    Raises:
        InputError: huggingface_hub is not installed, the hub cannot be reached, or the set or the split is not there.
    """
    if source.hub is None:
        raise InputError(f"source {source.name} is not on the hub: name local files with --input")
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as e:
        raise InputError(
            f"fetching {source.hub} needs the package huggingface_hub ({e}); install it, "
            "or name local files with --input"
        ) from None

    try:
        files = HfApi().list_repo_files(source.hub, repo_type="dataset")
        wanted = split_files(files, source.config, split)
        if not wanted:
            raise InputError(f"{source.hub}: no parquet or jsonl files of split {split!r} among {len(files)} files")
        return [Path(hf_hub_download(source.hub, file, repo_type="dataset")) for file in wanted]
    except InputError:
        raise
    except Exception as e:  # the library raises many kinds for an unreachable hub
        raise InputError(
            f"{source.hub} could not be fetched from the Hugging Face hub ({type(e).__name__}: "
            f"{(str(e).splitlines() or [''])[0]}); name local files with --input"
        ) from None


def split_files(files: list[str], config: str | None, split: str) -> list[str]:
    """The data files of one split: `<config>/<split>-00000-of-00001.parquet`, `data/<split>-...`, `<split>.jsonl`."""
    data = [f for f in sorted(files) if f.endswith((".parquet", ".jsonl"))]
    named = [f for f in data if f.rsplit("/", 1)[-1].split(".")[0].split("-")[0] == split]
    folders = [config] if config is not None else []
    for folder in (*folders, "data", ""):
        found = [f for f in named if f.rpartition("/")[0] == folder]
        if found:
            return found
    return []
