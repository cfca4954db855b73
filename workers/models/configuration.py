"""The configuration of a model (`open_clip_config.json`, or any `.json` of that form), read by allow-list.

A configuration comes with weights from unknown sources, and open_clip passes parts of it to other libraries as arguments, some of
which would execute code. Importing this module stays cheap: no torch.

Invariant: a configuration that was read holds the keys below and no others, each of its type and within its range, so it can
describe a network and do nothing else.
"""

import importlib.util
import json
import sys
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from merge_service.errors import UserError

LOCAL, HUB = "local-dir:", "hf-hub:"
MAX_BYTES = 1024 * 1024
OPENAI: dict[str, Any] = {
    "size": 224,
    "mode": "RGB",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
"""The preprocessing of OpenAI's CLIP, which is open_clip's default."""
CLIP_TOKENS = 49408
"""Tokens of open_clip's own tokenizer, which serves every model without `hf_tokenizer_name`."""

Count = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=100)]
Size = Count | tuple[Count, Count]
Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
"""A name from a library's own list: no path, and no address that the library would download from."""
Repository = Annotated[str, Field(pattern=r"^[A-Za-z0-9./~][A-Za-z0-9_./~ -]*$", max_length=500)]
Level = Annotated[int, Field(ge=0, le=255)]
Channels = tuple[float, float, float]
Spread = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class ModelError(UserError):
    """A model that cannot be what its configuration says; building it fails in the same way on every machine."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ActKwargs(_Part):
    approximate: Literal["none", "tanh"] = "none"


class NormKwargs(_Part):
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-5


class TokenizerKwargs(_Part):
    """Allowed arguments of a tokenizer. None names a file, and none is passed on to another library."""

    clean: Literal["whitespace", "canonicalize", "lower"] = "whitespace"
    strip_sep_token: bool = False
    language: Plain | None = None
    additional_special_tokens: list[str] | None = None


class _Blocks(_Part):
    """The settings that both towers have."""

    mlp_ratio: Ratio = 4.0
    ls_init_value: Annotated[float, Field(ge=0, le=100)] | None = None
    final_ln_after_pool: bool = False
    output_tokens: bool = False
    act_kwargs: ActKwargs | None = None
    norm_kwargs: NormKwargs | None = None
    block_type: Literal["default", "custom"] | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


class VisionCfg(_Blocks):
    """open_clip's `CLIPVisionCfg`."""

    layers: Count | tuple[Count, Count, Count, Count] = 12
    width: Count = 768
    head_width: Count = 64
    patch_size: Count | None = 16
    image_size: Size = 224
    patch_dropout: Share = 0.0
    attentional_pool: bool | Literal["parallel", "cascade"] = False
    attn_pooler_queries: Count = 256
    attn_pooler_heads: Count = 8
    no_ln_pre: bool = False
    pos_embed_type: Literal["learnable", "sin_cos_2d"] = "learnable"
    pool_type: Literal["tok", "avg", "none"] = "tok"
    timm_model_name: Plain | None = None
    timm_model_pretrained: bool = False
    timm_pool: Literal[
        "", "avg", "max", "avgmax", "catavgmax", "fast", "map", "token", "abs_attn", "rot_attn"
    ] = "avg"
    timm_proj: Literal["", "linear", "mlp", "none"] | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: Share = 0.0
    timm_drop_path: Share | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.timm_model_name or isinstance(self.layers, tuple):
            return self
        heads = self.width // self.head_width
        if heads < 1 or self.width % heads:
            raise ValueError(f"width {self.width} cannot be shared by heads of head_width {self.head_width}")
        if self.patch_size is None or self.patch_size > _least(self.image_size):
            raise ValueError(f"patch_size {self.patch_size} does not fit image_size {self.image_size}")
        return self


class TextCfg(_Blocks):
    """open_clip's `CLIPTextCfg`."""

    context_length: Annotated[int, Field(ge=2, le=100_000)] = 77
    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)] = CLIP_TOKENS
    hf_tokenizer_name: Repository | None = None
    tokenizer_mode: Literal["clips"] | None = None
    tokenizer_kwargs: TokenizerKwargs | None = None
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    embed_cls: bool = False
    pad_id: Annotated[int, Field(ge=0)] = 0
    eos_id: Annotated[int, Field(ge=0)] = 2
    no_causal_mask: bool = False
    pool_type: Literal["first", "last", "argmax", "eos", "none"] = "argmax"
    proj_bias: bool = False
    proj_type: Literal["linear", "none"] = "linear"
    hf_model_name: Repository | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: Literal["linear", "mlp"] | None = "mlp"
    hf_pooler_type: (
        Literal["mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler"] | None
    ) = "mean_pooler"

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> Self:
        if self.hf_model_name is None and self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared by heads {self.heads}")
        given = self.tokenizer_kwargs
        if self.hf_tokenizer_name is None and given and (given.strip_sep_token or given.language):
            raise ValueError("tokenizer_kwargs.strip_sep_token and language need hf_tokenizer_name")
        texts = not (info.context or {}).get("only_tokens")
        if texts and self.hf_tokenizer_name is None and self.vocab_size < CLIP_TOKENS:
            raise ValueError(
                f"vocab_size {self.vocab_size} is less than the {CLIP_TOKENS} tokens of open_clip's own tokenizer; give "
                "hf_tokenizer_name, the tokenizer that the model was trained with"
            )
        return self


class MultimodalCfg(TextCfg):
    """open_clip's `MultimodalCfg`, the decoder of CoCa."""

    mlp_ratio: Ratio = 4
    dim_head: Count = 64
    heads: Count = 8
    n_queries: Count = 256
    attn_pooler_heads: Count = 8

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared by heads {self.heads}")
        return self


class ModelCfg(_Part):
    """The arguments from which open_clip builds a network."""

    embed_dim: Count
    vision_cfg: VisionCfg
    text_cfg: TextCfg
    multimodal_cfg: MultimodalCfg | None = None
    custom_text: bool = False
    quick_gelu: bool = False
    init_logit_scale: Annotated[float, Field(ge=-100, le=100)] | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False


class Preprocess(_Part):
    """How pixels become a model's input; a missing key means open_clip's default. `size` is that of the image tower."""

    mean: Channels | None = None
    std: Spread | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    fill_color: Level | None = None


class PreprocessCfg(Preprocess):
    """The same as open_clip writes it."""

    size: Size | None = None
    mode: Literal["RGB"] | None = None
    interpolation: Literal["bicubic", "bilinear", "random"] | None = None  # type: ignore[assignment]


class Configuration(_Part):
    """A whole file."""

    model_cfg: ModelCfg
    preprocess_cfg: PreprocessCfg | None = None


def unknown_model(checkpoint: Path) -> UserError:
    """What to say of a checkpoint without a configuration of open_clip beside it: another library's model, or one that must be named."""
    home = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        kind = json.loads((home / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = None
    if isinstance(kind, str):
        return UserError(
            f"{checkpoint} is a model of transformers ({kind[:40]!r}), and only open_clip models are measured, learned from and scored here; "
            "it can be merged by techniques without data (wudi, tsv_m, ties and others)"
        )
    return UserError(
        f"{checkpoint} has no {CONFIG_FILE} beside it, so its model is not known; name it (--model NAME, or the file of a configuration)"
    )


def read_configuration(file: Path, *, only_tokens: bool = False) -> dict[str, Any]:
    """{"model_cfg": {...}, "preprocess_cfg": {...}} of a file, as written; the latter may be missing.

    A file with a `model_cfg` alone, as in open_clip's own `model_configs/*.json`, is accepted as well. With
    `only_tokens` the model is given tokens and no texts, so it needs no tokenizer. Raises UserError naming the file, the key and the
    nearest known key.
    """
    try:
        size = file.stat().st_size if file.is_file() else -1
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if size < 0:
        raise UserError(
            f"{file} is missing: a weights directory holds {WEIGHTS_FILE} and {CONFIG_FILE}"
            if file.name == CONFIG_FILE
            else f"{file} does not exist; give the configuration of a model"
        )
    if size > MAX_BYTES:
        raise UserError(f"{file} has {size} bytes; the configuration of a model is small, check the path")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    return checked(raw, str(file), only_tokens=only_tokens)


def checked(raw: Any, where: str, *, only_tokens: bool = False) -> dict[str, Any]:
    """A configuration that was read from `where`, unchanged. Raises UserError naming every wrong key."""
    if isinstance(raw, dict) and "model_cfg" not in raw and "vision_cfg" in raw:
        raw = {"model_cfg": raw}
    found = raw.get("model_cfg") if isinstance(raw, dict) else None
    lacking = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in (found or {})]
    if not isinstance(found, dict) or lacking:
        raise ModelError(
            f'{where} has no {", ".join(lacking)} under "model_cfg": it does not describe an open_clip model'
        )
    try:
        Configuration.model_validate_json(json.dumps(raw), strict=True, context={"only_tokens": only_tokens})
    except ValidationError as error:
        wrong = dict.fromkeys(_explained(entry) for entry in error.errors(include_url=False))
        raise ModelError(f"{where}: {'; '.join(wrong)}") from None
    assert isinstance(raw, dict)
    return raw


def is_tokenizer_file(file: Path) -> bool:
    """Whether a file of a weights directory belongs to its Hugging Face tokenizer: data, never code."""
    if file.suffix not in (".json", ".txt", ".model") or not file.is_file():
        return False
    return any(
        word in file.name for word in ("token", "vocab", "merges", "sentencepiece", "spiece", "special_")
    )


def own_configuration(config: str) -> Path | None:
    """The file that `model.config` names: a configuration, a directory that holds one, or one of ours; None for other names."""
    path = Path(config.removeprefix(LOCAL))
    if config.startswith(LOCAL) or path.is_dir():
        return path / CONFIG_FILE
    if path.suffix == ".json":
        return path
    ours = our_models().get(config)
    return ours / CONFIG_FILE if ours else None


def our_models() -> dict[str, Path]:
    """Configurations in `configs/models/` below the working directory and below the source tree; the former take precedence."""
    roots = (Path(__file__).parents[2], Path.cwd())
    found = [file.parent for root in roots for file in root.glob(f"configs/models/*/{CONFIG_FILE}")]
    return {directory.name: directory for directory in sorted(found)}


@cache
def open_clip_models() -> dict[str, Path]:
    """The configurations of open_clip, by name, without importing it (which takes seconds)."""
    if "open_clip" not in sys.modules and (spec := importlib.util.find_spec("open_clip")) is not None:
        places = list(spec.submodule_search_locations or ())
    else:
        places = list(sys.modules["open_clip"].__path__) if "open_clip" in sys.modules else []
    files = [file for place in places for file in Path(place).glob("model_configs/*.json")]
    return {file.stem: file for file in sorted(files)}


def architecture(config: str, *, only_tokens: bool = False) -> dict[str, Any]:
    """The configuration that `model.config` names, except `hf-hub:`. Raises UserError naming the nearest known names."""
    own = own_configuration(config)
    if own is not None:
        return read_configuration(own, only_tokens=only_tokens)
    known = open_clip_models()
    name = config.replace("/", "-")
    if name not in known:
        names = [*our_models(), *known]
        near = get_close_matches(config, names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(names[:8])}, ..."
        raise ModelError(f"model.config: there is no model configuration named {config!r}: {hint}")
    return {"model_cfg": json.loads(known[name].read_text(encoding="utf-8"))}


def _least(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else min(size)


def _explained(entry: Any) -> str:
    """One mistake: the key, what is wrong, and for an unknown key the nearest known one."""
    names = [str(part) for part in entry["loc"] if isinstance(part, int) or not _is_branch(part)]
    key, kind = ".".join(names) or "the file", entry["type"]
    if kind == "extra_forbidden":
        near = get_close_matches(names[-1], _keys(names[:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_keys(names[:-1]))}"
        code = "; nothing that comes with a model is executed" if "remote_code" in names[-1] else ""
        return f"{key}: unknown key; {hint}{code}"
    if kind == "missing":
        return f"{key}: is missing"
    text = str(entry["ctx"]["error"]) if kind == "value_error" else entry["msg"]
    shown = "" if isinstance(entry["input"], dict) else f"{json.dumps(entry['input'], default=repr)[:60]}: "
    return f"{key}: {shown}{text[0].lower()}{text[1:]}"


def _is_branch(part: str) -> bool:
    """Whether a part of pydantic's location names an alternative of a type, not a key."""
    return part in ("int", "float", "bool", "str") or "[" in part


def _keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Configuration
    for name in path:
        annotation = model.model_fields[name].annotation
        model = next(
            t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return list(model.model_fields)
