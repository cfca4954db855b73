"""The techniques that look at a tensor as a whole: its angles to the others' (Gram), or its singular vectors.

Invariant: as `catalogue.py`.
"""

from merge_service.techniques.definition import AVERAGING, LOGIT_SCALE, SCALE, WEIGHT, Technique
from merge_service.techniques.params import Param
from merge_service.techniques.spherical import Karcher, MultiSlerp, NuSlerp
from merge_service.techniques.tensorwise import FusedMatrices, Isotropic, IsotropicTasks, Orthogonal, Stock

SPACE = Param(
    "space",
    "choice",
    "weights",
    "what is turned: the weights themselves, or (as MergeKit does when it is given a base) their differences from the base",
    choices=("weights", "task_vectors"),
)
ATTENTION = Param(
    "attention",
    "choice",
    "split",
    "q, k and v packed in one tensor (and gate and up): split into the matrices they are, which the published numbers used, or "
    "whole",
    choices=("split", "whole"),
)
TEXT_PROJECTION = Param(
    "text_projection",
    "choice",
    "matrix",
    "matrix: as any other matrix (FusionBench); mean: averaged as what is no matrix (the authors' code)",
    choices=("matrix", "mean"),
)
_MERGE_FOLD = frozenset({"merge", "fold"})
_MERGE_STREAM = frozenset({"merge", "stream"})
_ON_WEIGHTS = dict.fromkeys(
    ("P7", "P8", "P9"), "turns weights, not task vectors, unless space is task_vectors"
)
_NO_STREAM = {"P5": "needs the inner products of all experts"}
_ARC = {"P10": "follows the arc, outside the chord"}
_SPECTRUM = {
    "P2": "copies of one expert come out with a flat spectrum",
    "P9": "singular vectors reach where no expert moved",
    "P10": "singular values are levelled",
}
_AVERAGING = (*AVERAGING[1:], Param(**{**vars(WEIGHT), "forms": frozenset({"fold"})}))

TENSORWISE: tuple[Technique, ...] = (
    Technique(
        "nuslerp",
        "θ = [sin((1-w)Ω) running + sin(wΩ) new] / sin Ω per tensor, of weights or of task vectors; a line where they are parallel",
        "NuSLERP in MergeKit, arXiv 2403.13257",
        (WEIGHT, SPACE, LOGIT_SCALE),
        combine=NuSlerp,
        space="weights",
        forms=_MERGE_FOLD,
        arity=2,
        exceptions={
            "P3": "the second checkpoint is the new one",
            "P4": "takes exactly two",
            "P5": "takes exactly two",
            **_ON_WEIGHTS,
            **_ARC,
        },
    ),
    Technique(
        "multislerp",
        "θ = (Σ w_i |θ_i|) · u, u the direction of Σ w_i θ_i / |θ_i|, per tensor, of weights or of task vectors",
        "MultiSLERP in MergeKit, arXiv 2403.13257",
        (*_AVERAGING, SPACE, LOGIT_SCALE),
        combine=MultiSlerp,
        space="weights",
        forms=_MERGE_FOLD,
        exceptions={**_NO_STREAM, **_ON_WEIGHTS, **_ARC},
    ),
    Technique(
        "karcher",
        "θ = (Σ w_i |θ_i|) · u, u the Riemannian mean of the directions θ_i / |θ_i| on the sphere, per tensor",
        "Karcher 1977; as in MergeKit, arXiv 2403.13257 (10 iterations, tolerance 1e-5)",
        (
            *_AVERAGING,
            Param("iterations", "int", 10, "most steps of the mean on the sphere", 1, 1000),
            Param("tolerance", "float", 1e-5, "radians; a step shorter than this is the last", 0),
            SPACE,
            LOGIT_SCALE,
        ),
        combine=Karcher,
        space="weights",
        forms=_MERGE_FOLD,
        exceptions={**_NO_STREAM, **_ON_WEIGHTS, **_ARC},
    ),
    Technique(
        "model_stock",
        "θ = θ0 + t · mean_i τ_i per tensor, t = N cos / (1 + (N-1) cos), cos the mean cosine over pairs of τ",
        "Model Stock, arXiv 2403.19522",
        (
            Param(
                "ratio",
                "choice",
                "clamped",
                "clamped: t stays in [0, 1]; raw: opposed experts extrapolate past the base (MergeKit, TIME's code)",
                choices=("clamped", "raw"),
            ),
            LOGIT_SCALE,
        ),
        combine=Stock,
        exceptions={"P1": "has no factor of the task vector; nothing merged is the base"},
    ),
    Technique(
        "iso_c",
        "θ = θ0 + scale · mean(S) U Vᵀ per matrix, Σ_i τ_i = U S Vᵀ; other tensors: scale · mean_i τ_i",
        "Iso-C in No Task Left Behind, arXiv 2502.04959",
        (SCALE, ATTENTION, TEXT_PROJECTION, LOGIT_SCALE),
        combine=Isotropic,
        exceptions=_SPECTRUM,
    ),
    Technique(
        "iso_cts",
        "θ = θ0 + scale · mean(S) U Vᵀ per matrix, from the leading directions of Σ_i τ_i and of each τ_i outside them",
        "Iso-CTS in No Task Left Behind, arXiv 2502.04959",
        (
            Param(
                "common_fraction",
                "float",
                0.8,
                "part of the directions that the sum of all experts has",
                0,
                1,
            ),
            SCALE,
            ATTENTION,
            TEXT_PROJECTION,
            LOGIT_SCALE,
        ),
        combine=IsotropicTasks,
        forms=_MERGE_FOLD,
        exceptions={**_SPECTRUM, "P5": "the directions of every expert depend on the sum of all"},
    ),
    Technique(
        "opcm",
        "Δ_t ∝ λ Δ_{t-1} + P(τ_t), P drops what lies along the singular vectors of Δ_{t-1}; |Δ_t| = mean_i |τ_i|",
        "OPCM in Merging Models on the Fly Without Retraining, arXiv 2501.09522",
        (
            Param(
                "alpha",
                "float",
                0.5,
                "part of the singular values' sum whose directions are closed to the new expert",
                0,
                1,
            ),
            ATTENTION,
            LOGIT_SCALE,
        ),
        combine=Orthogonal,
        forms=_MERGE_STREAM,
        ordered=True,
        exceptions={
            "P1": "has no factor of the task vector; nothing merged is the base",
            "P2": "what is already there is dropped from a copy",
            "P3": "every expert is projected against those before it",
            "P8": "holds, but singular vectors of equal singular values are not unique",
            "P9": "singular vectors reach where no expert moved",
            "P10": "the length is that of the mean task vector",
        },
    ),
    Technique(
        "rapf",
        "W = U (M ∘ Uᵀ new + (1 - M) ∘ Uᵀ running) per matrix, running = U S Vᵀ, D = |Uᵀ (new - running)|, M = min(D / max D + floor, 1)",
        "RAPF, arXiv 2407.14143",
        (
            Param(
                "floor",
                "float",
                0.6,
                "least share of the new model in every entry (b; the authors' 0.5 to 0.8)",
                0,
            ),
            ATTENTION,
            LOGIT_SCALE,
        ),
        combine=FusedMatrices,
        space="weights",
        forms=_MERGE_FOLD,
        arity=2,
        exceptions={
            "P1": "has no weight of the new model; nothing merged is the base",
            "P3": "the second checkpoint is the new one",
            "P4": "takes exactly two",
            "P5": "takes exactly two",
            "P7": "acts on weights, not on task vectors",
            "P8": "acts on weights, not on task vectors",
            "P9": "acts on weights, not on task vectors",
            "P10": "entries are mixed in rotated axes",
        },
    ),
)
