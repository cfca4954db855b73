"""How an expert is trained, as data.

The defaults are TIME's own recipe (FoMo-in-Flux v1.0, identical in every one of its experiment files). A recipe bears on
the weights that come out, so it is part of an expert's fingerprint: nothing in here may depend on where or how a run
is placed, and every field that is left out has one fixed value. Importing this module must stay cheap (no torch).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Precision = Literal["fp32", "bf16", "fp16"]
Trainable = Literal["all", "image", "text"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Mixture(_Frozen):
    """Shares of a batch that come from the pretraining pool, the current task, and the earlier tasks; they sum to 1.

    `Mixture()` is training without replay. Replay as TIME does it is `REPLAY`.
    """

    pretraining: float = Field(default=0.0, ge=0, le=1)
    update: float = Field(default=1.0, ge=0, le=1)
    buffer: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.pretraining + self.update + self.buffer
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"the shares pretraining {self.pretraining:g} + update {self.update:g} + buffer {self.buffer:g} "
                f"give {total:g}; they must sum to 1"
            )
        if self.update == 0:
            raise ValueError("update is 0: an expert that never sees its own task is not an expert of it")
        return self


REPLAY = Mixture(pretraining=0.33, update=0.34, buffer=0.33)


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Adapter(_Frozen):
    """An expert is the weights that it starts from plus low-rank products, which alone are trained (LoRA, Hu et al. 2021).

    `alpha` null is the rank. A product counts alpha / rank times, with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023). `targets` are
    modules by path or by the end of it, or `all-linear`: every linear layer and every packed attention of the towers that are trained.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=4096)
    alpha: float | None = Field(default=None, gt=0, le=1e6)
    rslora: bool = False
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("all-linear",)

    @property
    def scale(self) -> float:
        """What a product of factors is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


class Augment(_Frozen):
    """RandomResizedCrop of training images: area share and aspect ratio, each drawn between two bounds."""

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} is [{low:g}, {high:g}]; write [low, high] with 0 < low <= high")
        if self.scale[1] > 1:
            raise ValueError(f"scale reaches {self.scale[1]:g}; a crop cannot be larger than the image (1)")
        return self


class Recipe(_Frozen):
    """One expert's training, without its length (the budget decides that) and without its data.

    `lr` is the peak; it rises linearly over the first `warmup` share of the steps and falls along a cosine to
    `lr * min_lr_ratio`; both start anew with every task. `batch_size` is the global one, over all ranks.
    `weight_decay` acts on every trained parameter, as FoMo-in-Flux does it. `clip` bounds the gradient norm (0: no clipping).
    With `accumulate` above 1 the towers see the batch in so many parts, one after the other; the loss is still over the whole batch
    (GradCache, Gao et al. 2021; open_clip's `accum_freq`). `ema` is the decay of an average of the weights over steps, which is then
    what the expert delivers. `patch_dropout` is the share of patches left out of every picture (FLIP, Li et al. 2023), instead of what
    the model's configuration says. `compile` compiles the image tower, `tf32` lets a GPU multiply with ten bits of mantissa,
    `channels_last` lays pictures out pixel by pixel. With an `adapter` only that is trained, and kept.
    """

    optimizer: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-5, gt=0, le=10)
    weight_decay: float = Field(default=0.2, ge=0, le=10)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, le=1)
    batch_size: int = Field(default=512, ge=2, le=1_000_000)
    warmup: float = Field(default=0.1, ge=0, le=1)
    min_lr_ratio: float = Field(default=0.001, ge=0, le=1)
    clip: float = Field(default=1.0, ge=0)
    precision: Precision = "fp16"
    trainable: Trainable = "all"
    mixture: Mixture = Mixture()
    augment: Augment = Augment()
    accumulate: int = Field(default=1, ge=1, le=1_000_000)
    ema: float | None = Field(default=None, gt=0, lt=1)
    patch_dropout: float | None = Field(default=None, ge=0, lt=1)
    compile: bool = False
    tf32: bool = False
    channels_last: bool = False
    adapter: Adapter | None = None

    @property
    def asks_network(self) -> bool:
        """Whether not every network can be trained by it."""
        return self.accumulate > 1 or self.patch_dropout is not None or self.adapter is not None

    @property
    def trains(self) -> str:
        """What is trained, as a text by which costs are known: a tower or both, and the adapter if there is one."""
        return self.trainable + ("" if self.adapter is None else f" {self.adapter.model_dump_json()}")

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that uses none of the later keys is written, and named, as it was before there were some."""
        values: dict[str, Any] = handler(self)
        unused = {key for key in LATER if values[key] == type(self).model_fields[key].default}
        return {key: value for key, value in values.items() if key not in unused}

    @model_validator(mode="after")
    def _later_keys_agree(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulate: {self.accumulate} equal parts; make it a multiple"
            )
        if self.patch_dropout is not None and self.trainable == "text":
            raise ValueError(
                "patch_dropout acts on an image tower that is trained, and trainable: text freezes it; remove one of them"
            )
        if self.patch_dropout and self.compile:
            raise ValueError(
                "patch_dropout and compile exclude each other: a compiled tower draws its random numbers in another way; remove one"
            )
        return self

    @model_validator(mode="after")
    def _adapter_agrees(self) -> Self:
        if self.adapter is not None and self.ema is not None:
            raise ValueError(
                "ema and adapter exclude each other: products of averaged factors are not the average of the products; remove one"
            )
        if self.adapter is not None and self.compile:
            raise ValueError(
                "compile and adapter exclude each other: a compiled tower does not see that weights are made as they are read; remove one"
            )
        return self

    @model_validator(mode="after")
    def _betas_in_range(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must lie in [0, 1)")
        return self


LATER = ("accumulate", "ema", "patch_dropout", "compile", "tf32", "channels_last", "adapter")
"""Keys that a recipe names only where they are used, so that recipes without them keep their fingerprints."""
