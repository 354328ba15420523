"""A trained model as a folder that others load: weights, configuration, code, tokenizer, card, proof."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_sharedproj
from megatron_sharedproj.config import ModelConfig, write_json
from megatron_sharedproj.conversion import stock
from megatron_sharedproj.conversion.config_map import hugging_face_config
from megatron_sharedproj.conversion.megatron_checkpoint import model_state
from megatron_sharedproj.conversion.model_card import cache_line, model_card
from megatron_sharedproj.conversion.staging import check_output, staged_folder
from megatron_sharedproj.conversion.tokenizer_files import write_tokenizer
from megatron_sharedproj.conversion.verify import TOLERANCE, Verification, verification_windows, verify
from megatron_sharedproj.conversion.weights import padding_rows, to_hugging_face
from megatron_sharedproj.data.readers import sha256_of
from megatron_sharedproj.data.tokenizers import SlowTokenizer
from megatron_sharedproj.inference.loading import LoadedModel
from megatron_sharedproj.variants import CACHE_POLICIES

FORMATS = (stock.SHAREDPROJ, *stock.STOCK_FORMATS, stock.GGUF)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORD = "conversion.json"
# In safetensors' format; another ending, because engines load every *.safetensors that they find.
PADDING = "vocabulary_padding.st"
_WEIGHTS = (".safetensors", ".st", ".gguf")


@dataclass
class ExportOptions:
    """What to write.

    Attributes:
        output: folder to make; overwrite: replace the export that it holds.
        format: one of FORMATS; dtype: one of DTYPES, or empty for the one that the model was trained in.
        kv_cache_policy: of variants.CACHE_POLICIES, for config.json; of a model with ``rotate_keys``.
        max_shard_size: of a weights file ("5GB").
        verify: compare before anything appears under ``output``; verify_data, verify_tokens: on what
            (:func:`megatron_sharedproj.conversion.verify.verification_windows`); tolerance: see there.
        tokenizer_source: folder that the tokenizer was loaded from; load: checkpoint that the model is from.
    """

    output: Path
    format: str = stock.SHAREDPROJ
    dtype: str = ""
    kv_cache_policy: str = CACHE_POLICIES[0]
    max_shard_size: str = "5GB"
    overwrite: bool = False
    verify: bool = True
    verify_data: str = ""
    verify_tokens: int = 2048
    tolerance: float = TOLERANCE
    tokenizer_source: str = ""
    load: str = ""

    @property
    def name(self) -> str:
        """Of the model: its folder's."""
        return self.output.resolve().name


def check_options(options: ExportOptions) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    read = [options.load, options.tokenizer_source, options.verify_data]
    keep = [path for path in read if path]
    check_output(options.output, options.overwrite, record=RECORD, keep=keep)
    if options.verify_tokens < 2:
        raise ValueError(f"--verify-tokens {options.verify_tokens}: must be at least 2")
    if not options.tolerance > 0:
        raise ValueError(f"--verify-tolerance {options.tolerance}: must be positive")
    needed = {"transformers": "hf", "safetensors": "hf"}
    if options.format == stock.GGUF:
        needed["gguf"] = "gguf"
    for library, extra in needed.items():
        if importlib.util.find_spec(library) is None:
            raise ValueError(
                f"--format {options.format}: {library} is not installed; install the [{extra}] extra"
            )
    _shard_bytes(options.max_shard_size)


def _shard_bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip().upper())
    if not found or not float(found[1]):
        raise ValueError(f"--max-shard-size {size}: must be a size such as 500MB or 5GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def export(
    loaded: LoadedModel, options: ExportOptions, say: Callable[[str], None] = print
) -> Verification | None:
    """Write the folder; it appears under its name when all of it is written and verified.

    Args:
        loaded: the whole model in fp32 on the CPU, logits gathered. Its weights are rounded in place where
            ``options.dtype`` has fewer bits than they were trained in.
    Returns:
        The comparison, or None where it was switched off.
    Raises:
        ValueError: naming the flag, for a format that cannot hold the model, an output that cannot be
            written, data that cannot be used, or a verification that failed.
    """
    run, config, vocab_size = loaded.config, loaded.config.model, loaded.tokenizer.vocab_size
    check_options(options)
    stock.check_format(config, options.format)
    _check_policy(config, options)
    if options.format == stock.GGUF and isinstance(loaded.tokenizer, SlowTokenizer):
        raise ValueError(
            f"--format gguf: {loaded.tokenizer.name} is no byte-level BPE, the one kind that is written into "
            "a GGUF; use another format"
        )
    dtype = DTYPES[options.dtype] if options.dtype else getattr(torch, run.train.params_dtype)
    notes = _round(loaded, dtype)
    windows, source = None, ""
    if options.verify:
        windows, source = verification_windows(loaded, options.verify_data, options.verify_tokens)
    state = model_state(loaded.model)
    tensors = {name: t.to(dtype) for name, t in to_hugging_face(config, state, vocab_size).items()}
    with _written(options), staged_folder(options.output, options.overwrite) as folder:
        ids = write_tokenizer(
            loaded.tokenizer, options.tokenizer_source, folder, config.max_position_embeddings
        )
        takes_text = (folder / "tokenizer_config.json").is_file()
        if not takes_text:
            notes.append(f"No tokenizer files: {loaded.tokenizer.name} takes no text.")
        cache = cache_line(config, options.kv_cache_policy)
        if options.format == stock.SHAREDPROJ:
            _write_sharedproj(folder, config, tensors, ids, dtype, options)
            padding = padding_rows(config, state, vocab_size)
            _write_padding(folder, {name: rows.to(dtype) for name, rows in padding.items()})
        else:
            cache, *further = _write_stock(folder, loaded, tensors, ids, options)
            notes += further
            if options.format == stock.GGUF and options.verify:
                notes.append(
                    "The figures above are of the transformers model that the GGUF holds; the file itself "
                    "was read back and compared byte for byte."
                )
        say(f"wrote {sum(f.stat().st_size for f in folder.iterdir()):,} bytes; {cache}")
        result = None
        checks = ["Not verified (`--no-verify`)."]
        if windows is not None:
            exported = _load(folder, options, config, tensors, ids)
            # Only the package's own format has the cache that is to be proven.
            own = options.format == stock.SHAREDPROJ
            result = verify(loaded, exported, windows, source, tolerance=options.tolerance, check_cache=own)
            for line in result.lines():
                say(line)
            used = ", ".join(f"{name} {version}" for name, version in versions().items())
            checks = [*result.lines(), f"compared on {datetime.date.today()} with {used}, on the CPU"]
        card = model_card(
            run,
            loaded.train_state,
            name=options.name,
            format=options.format,
            takes_text=takes_text,
            vocab_size=vocab_size,
            cache=cache,
            policy=options.kv_cache_policy,
            checks=checks,
            notes=notes,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / RECORD, _record(folder, loaded, options, dtype, result))
    return result


def _check_policy(config: ModelConfig, options: ExportOptions) -> None:
    policy = options.kv_cache_policy
    choices = [len(config.cached_tensors(name)) for name in (CACHE_POLICIES[0], policy)]
    if policy == CACHE_POLICIES[0]:
        return
    if options.format != stock.SHAREDPROJ:
        raise ValueError(
            f"--kv-cache-policy {policy}: an engine of --format {options.format} decides what it stores; "
            f"leave it out, or use --format {stock.SHAREDPROJ}"
        )
    if choices[0] == choices[1]:
        raise ValueError(
            f"--kv-cache-policy {policy}: is for --kv-rotary rotate_keys of a tied key/value, and this model "
            f"is {config.attention_variant} with {config.kv_rotary}; leave it out"
        )


@contextlib.contextmanager
def _written(options: ExportOptions) -> Iterator[None]:
    """A full disk and the like are the user's to mend: one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--output {options.output}: cannot be written ({reason})") from error


def _round(loaded: LoadedModel, dtype: torch.dtype) -> list[str]:
    """Round the model's weights to what will be written, so that the comparison is of the conversion."""
    changed = 0
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            rounded = parameter.to(dtype).to(parameter.dtype)
            changed += int((rounded != parameter).sum())
            parameter.copy_(rounded)
    if not changed:
        return []
    name = str(dtype).removeprefix("torch.")
    return [f"{changed:,} weights were rounded to {name}; the verification compares with the rounded model."]


def _write_sharedproj(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    ids: dict[str, int | None],
    dtype: torch.dtype,
    options: ExportOptions,
) -> None:
    from megatron_sharedproj.layers import hf

    values = hugging_face_config(
        config,
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        dtype=str(dtype).removeprefix("torch."),
        kv_cache_policy=options.kv_cache_policy,
        **ids,
    )
    # The class checks what the loader will check, and adds the map to the code beside it.
    values = hf.SharedProjConfig(**values).to_dict()
    _write_model(folder, values, tensors, options.max_shard_size)
    for file in hf.SOURCE_FILES:
        shutil.copy(file, folder)


def _write_model(
    folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], max_shard_size: str
) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    write_json(folder / "config.json", values)
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["eos_token_id"]
    GenerationConfig(**ids).save_pretrained(folder)
    save_torch_state_dict(tensors, folder, max_shard_size=_shard_bytes(max_shard_size))


def _write_padding(folder: Path, rows: dict[str, Tensor]) -> None:
    if any(tensor.shape[0] for tensor in rows.values()):
        from safetensors.torch import save_file

        save_file(rows, folder / PADDING)


def _write_stock(
    folder: Path,
    loaded: LoadedModel,
    tensors: dict[str, Tensor],
    ids: dict[str, int | None],
    options: ExportOptions,
) -> list[str]:
    """Returns what the format's cache costs, and further notes."""
    config = loaded.config.model
    if options.format == stock.GGUF:
        from megatron_sharedproj.conversion.gguf_file import write_gguf

        return write_gguf(
            folder / "model.gguf",
            config,
            tensors,
            tokenizer_json=loaded.tokenizer.to_json(),
            dtype=str(tensors["model.norm.weight"].dtype).removeprefix("torch."),
            name=options.name,
            **ids,
        )
    model = _STOCK[options.format](config, tensors, **ids)
    _write_model(folder, model.config, model.tensors, options.max_shard_size)
    return [model.note]


_STOCK = {"gpt2": stock.to_gpt2, "llama": stock.to_llama}


def _load(
    folder: Path,
    options: ExportOptions,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    ids: dict[str, int | None],
) -> Any:
    """What was written, as a transformers model in fp32."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    import megatron_sharedproj.layers.hf  # noqa: F401  (registers the Auto classes)

    transformers.logging.disable_progress_bar()
    if options.format == stock.GGUF:
        # transformers reads no GGUF without an engine of its own: the stock model that the file was made of.
        name = stock.stock_format(config)
        model = _STOCK[name](config, {n: t.float() for n, t in tensors.items()}, **ids)
        values = dict(model.config)
        exported = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        exported.load_state_dict(model.tensors, strict=False)
        return exported.float().eval()
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The plain path is what a machine without this package takes.
    exported.config.use_compiled_kernel = False
    return exported


def _record(
    folder: Path,
    loaded: LoadedModel,
    options: ExportOptions,
    dtype: torch.dtype,
    result: Verification | None,
) -> dict[str, Any]:
    return {
        "format": options.format,
        "dtype": str(dtype).removeprefix("torch."),
        "iteration": loaded.train_state.get("iteration", 0),
        "seq_length": loaded.config.train.seq_length,
        "vocab_size": loaded.tokenizer.vocab_size,
        "padded_vocab_size": loaded.config.model.padded_vocab_size,
        "tokenizer": loaded.tokenizer.describe(),
        "verification": dataclasses.asdict(result) if result else None,
        # A safetensors file has no checksum of its own.
        "sha256": {f.name: sha256_of(f) for f in sorted(folder.iterdir()) if f.suffix in _WEIGHTS},
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What wrote and verified an export."""
    import transformers

    return {
        "megatron_sharedproj": megatron_sharedproj.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def read_record(folder: Path, flag: str = "--load") -> dict[str, Any]:
    """conversion.json of an exported folder, its weights checked against it; empty where there is none.

    Raises:
        ValueError: if it is damaged, or a weights file is not the one that was exported.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sums = dict(record["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {folder}: {RECORD} is damaged ({error}); remove it to go on") from None
    for name, expected in sums.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise ValueError(
                f"{flag} {folder}: {name} is not the file that was exported (sha256 in {RECORD}); copy it "
                f"again, or remove {RECORD} if it was changed on purpose"
            )
    return record
