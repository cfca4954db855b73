"""Spectra: the singular values of summed matrices are made equal (Iso-C, Iso-CTS), or calibrated one by one (SVC).

The arithmetic of one matrix is in functions that take `xp`, numpy or torch, and give the type of the task vectors;
`blocks/singular.py` has what they share. Signs of singular vectors cancel. Equal singular values do not determine their vectors:
this affects SVC, by its definition, and not Iso-C.
"""

from collections.abc import Iterable
from typing import Any

from merge_service.anatomy.packed import Matrix
from merge_service.blocks.questions import Ask, Findings
from merge_service.blocks.singular import cross, frame, left_vectors, noise, rows_of, spectrum, wide
from merge_service.techniques.definition import Technique
from merge_service.techniques.params import ATTENTION, LOGIT_SCALE, SCALE, SUM_SCALE, WEIGHING, Param
from merge_service.techniques.place import Array, State, View
from merge_service.techniques.rule import Tensor, TensorRule, summed
from merge_service.techniques.shares import weight_of

TEXT_PROJECTION = Param(
    "text_projection",
    "choice",
    "matrix",
    "matrix: as any other matrix (FusionBench); mean: averaged as what is no matrix (the authors' code)",
    choices=("matrix", "mean"),
)
SCOPE = Param(
    "scope",
    "choice",
    "blocks",
    "which matrices are calibrated: those in blocks, or all, tables of tokens and of positions too (as released)",
    choices=("blocks", "matrices"),
)


class Isotropic(TensorRule):
    """Iso-C: the summed matrix with all singular values made equal; the mean for other tensors."""

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        averaged = self.params["text_projection"] == "mean" and "text_projection" in tensor.name
        if averaged or not tensor.pieces:
            return state["sum"] / tensor.dtype.type(count)
        return self.by_matrix(tensor, tensor.pieces, lambda piece: self.solved(tensor, state, piece, count))

    def solved(self, tensor: Tensor, state: State, piece: Matrix, count: int) -> Array:
        """The result for one matrix of `count` experts."""
        return tensor.solve(isotropic, summed(state, piece))


class IsotropicTasks(Isotropic):
    """Iso-CTS: as Iso-C, with additional directions of every expert; reads the experts a second time."""

    def solved(self, tensor: Tensor, state: State, piece: Matrix, count: int) -> Array:
        taus = (tensor.put(tensor.matrix(order, piece)) for order in tensor.orders)
        fraction = self.params["common_fraction"]
        return tensor.solve(
            isotropic_task_specific, summed(state, piece), taus=taus, count=count, common_fraction=fraction
        )


class Calibrated(TensorRule):
    """SVC after a sum of task vectors: `calibrated` per matrix, the sum elsewhere; reads the experts a second time."""

    adds = True

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        weight = weight_of(self.params, order, tensor.name)
        for where, tau in tensor.blocks(order):
            state["sum"][where] += tau if weight == 1 else tau * tau.dtype.type(weight)

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if view.merged and self.params["scope"] == "blocks":
            view.anatomy.require_blocks("SVC calibrates the matrices of blocks", "set scope to matrices")
        return found

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        def solve(piece: Matrix) -> Array:
            taus = (tensor.put(tensor.matrix(order, piece)) for order in tensor.orders)
            scale, alpha = self.params["scale"], self.params["alpha"]
            return tensor.solve(calibrated, summed(state, piece), taus=taus, scale=scale, alpha=alpha)

        if not tensor.pieces or (tensor.layer is None and self.params["scope"] == "blocks"):
            return state["sum"]
        return self.by_matrix(tensor, tensor.pieces, solve)


def isotropic(total: Array, *, xp: Any) -> Array:
    """Iso-C (arXiv 2502.04959): mean(S) * U V^T of `total` = U S V^T, the (m, n) sum of the task vectors.

    The mean is over the numerical rank: the nuclear norm stays, and all singular values that are not zero become equal. (The
    released code divides by min(m, n) and fills directions in which no expert moved.) Zeros give zeros.
    """
    if total.shape[0] < total.shape[1]:
        return isotropic(total.T, xp=xp).T
    values, right = frame(total, xp)
    if not len(values):
        return xp.zeros_like(total)
    half = right * (values.mean() / values) ** 0.5
    flat = half @ half.T
    result = xp.empty_like(total)
    for rows in rows_of(total):
        result[rows] = wide(total[rows], xp) @ flat
    return result


def isotropic_task_specific(
    total: Array, taus: Iterable[Array], count: int, common_fraction: float = 0.8, *, xp: Any
) -> Array:
    """Iso-CTS (arXiv 2502.04959): leading directions of the sum, and of each task vector outside them, of equal length.

    `taus` yields the `count` task vectors whose sum is `total`, (m, n) all; each is read once and released. Of the min(m, n)
    directions a task has `task_dimensions`, the sum has the others. If that is 0 (more tasks than directions to share), the
    result is Iso-C and `taus` is not read. Directions below the numerical rank are left out (a task's are measured against the
    Frobenius norm of its whole task vector), and the mean is over the singular values taken. Directions that coincide, as equal
    experts' do, count once.
    """
    own = task_dimensions(min(total.shape), count, common_fraction)
    if not own:
        return isotropic(total, xp=xp)
    left, values, right, rest = _common(total, min(total.shape) - own * count, xp)
    parts = [(left, values, right)]
    for tau in taus:
        parts.append(_inside(tau, rest, own, xp) if rest is not None else _outside(tau, left, own, xp))
    lefts, levels, rights = (xp.concatenate(side, -1) for side in zip(*parts))
    if not len(levels):
        return xp.zeros_like(total)
    core = _inverse_root(lefts, xp) @ _inverse_root(rights, xp) * levels.mean()
    return xp.asarray(lefts @ core @ rights.T, dtype=total.dtype)


def calibrated(total: Array, taus: Iterable[Array], *, scale: float, alpha: float, xp: Any) -> Array:
    """SVC (arXiv 2602.05536): every singular value of `total`, divided by how much of it the experts count more than once.

    `taus` yields the N task vectors whose sum is `total`, (m, n) all; each is read once and released. With scale * total = U S
    V^T, a_r = u_r^T (scale * total) and a_r^i = u_r^T tau_i, expert i counts s_r^i = <a_r, a_r^i> / |a_r^i|^2 times in direction
    r, or `alpha` (above 0) times if that is more, or if its a_r^i is zero (against the rounding of its Frobenius norm). S_r is
    multiplied by gamma_r = N / sum_i max(alpha, s_r^i). So N copies of an expert whose scale * N is at least `alpha` give the
    expert back once the caller has applied `scale`. Parts below the numerical rank are unchanged.
    """
    left = left_vectors(total, xp)
    own, counted, count = cross(left, total, xp), 0.0, 0
    for tau in taus:
        seen = cross(left, tau, xp)
        squares = (seen * seen).sum(1)
        size = sum(float((wide(tau[rows], xp) ** 2).sum()) for rows in rows_of(tau))
        present = squares > size * noise(tau.shape) ** 2
        times = (own * seen).sum(1) * scale / xp.where(present, squares, 1)
        counted, count = counted + xp.clip(xp.where(present, times, 0), alpha, None), count + 1
    further = ((count / counted - 1) * own.T).T
    result = xp.empty_like(total)
    for rows in rows_of(total):
        result[rows] = wide(total[rows], xp) + left[rows] @ further
    return result


def task_dimensions(size: int, count: int, common_fraction: float) -> int:
    """How many of `size` directions each of `count` tasks has in Iso-CTS: round((size - int(size * fraction)) / count).

    As in the released code, but never more than size // count; rounding up would leave the sum a negative number.
    """
    return min(round((size - int(size * common_fraction)) / count), size // count)


def _common(total: Array, count: int, xp: Any) -> tuple[Array, Array, Array, Array | None]:
    """At most `count` leading singular triplets, and if it is cheap (m <= n) a basis of the complement of the left vectors."""
    if total.shape[0] > total.shape[1]:
        values, right = frame(total, xp, count)
        return wide(total, xp) @ (right / values), values, right, None
    tall = total.T
    values, vectors, rank = spectrum(cross(tall, tall, xp), tall.shape, xp)
    cut = len(values) - min(count, rank)
    left, values = vectors[:, cut:], values[cut:]
    return left, values, wide(tall, xp) @ (left / values), vectors[:, :cut]


def _inside(tau: Array, basis: Array, count: int, xp: Any) -> tuple[Array, Array, Array]:
    """The `count` leading singular triplets of tau (m <= n) within the space of the orthonormal columns of `basis`."""
    full = wide(tau, xp)
    part = basis.T @ full
    values, vectors, rank = spectrum(part @ part.T, tau.shape, xp, float((full * full).sum()) ** 0.5)
    cut = len(values) - min(count, rank)
    values, vectors = values[cut:], vectors[:, cut:]
    return basis @ vectors, values, part.T @ (vectors / values)


def _outside(tau: Array, basis: Array, count: int, xp: Any) -> tuple[Array, Array, Array]:
    """The `count` leading singular triplets of tau (m > n) outside the space of the orthonormal columns of `basis`."""
    gram, seen = cross(tau, tau, xp), cross(basis, tau, xp)
    scale = float(xp.diag(gram).sum()) ** 0.5
    values, right, rank = spectrum(gram - seen.T @ seen, tau.shape, xp, scale)
    cut = len(values) - min(count, rank)
    values, right = values[cut:], right[:, cut:]
    unit = right / values
    return wide(tau, xp) @ unit - basis @ (seen @ unit), values, right


def _inverse_root(columns: Array, xp: Any) -> Array:
    """(C^T C)^(-1/2) on the numerical rank of C: C times it is the polar factor, the nearest orthonormal columns."""
    values, vectors = frame(columns, xp)
    half = vectors / values**0.5
    return half @ half.T


_BREAKS = {
    "P2": "copies of one expert come out with a flat spectrum",
    "P9": "singular vectors reach where no expert moved",
    "P10": "singular values are levelled",
}

TECHNIQUES = (
    Technique(
        "iso_c",
        "θ = θ0 + scale · mean(S) U Vᵀ per matrix, Σ_i τ_i = U S Vᵀ; other tensors: scale · mean_i τ_i",
        "Iso-C in No Task Left Behind, arXiv 2502.04959",
        (SCALE, ATTENTION, TEXT_PROJECTION, LOGIT_SCALE),
        unweighed="all directions of the experts' plain sum come out equally long, so a factor would not say how much an expert counts",
        rule=Isotropic,
        portable=False,
        breaks=_BREAKS,
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
        unweighed="all directions of the experts come out equally long, so a factor would not say how much an expert counts",
        rule=IsotropicTasks,
        portable=False,
        forms=frozenset({"merge", "fold"}),
        breaks={**_BREAKS, "P5": "the directions of every expert depend on the sum of all"},
    ),
    Technique(
        "svc_task_arithmetic",
        "θ = θ0 + U γ S Vᵀ per matrix, scale · Σ_i w_i τ_i = U S Vᵀ, γ_r = N / Σ_i max(alpha, <a_r, a_rⁱ> / |a_rⁱ|²), a_r = S_r V_rᵀ, "
        "a_rⁱ = U_rᵀ τ_i; other tensors: scale · Σ_i w_i τ_i",
        "SVC, arXiv 2602.05536, on top of Task arithmetic, arXiv 2212.04089",
        (
            Param(
                "alpha",
                "float",
                0.1,
                "least number of times that an expert counts in a direction; the smaller, the more the sum may grow there",
                0,
                above_low=True,
            ),
            SCOPE,
            SUM_SCALE,
            *WEIGHING,
            ATTENTION,
            LOGIT_SCALE,
        ),
        rule=Calibrated,
        portable=False,
        forms=frozenset({"merge"}),
        breaks={
            "P2": "copies of one expert add up in tensors that are no matrices",
            "P5": "how often experts count depends on the sum of all",
            "P9": "singular vectors reach where no expert moved",
            "P10": "a sum leaves the convex hull",
        },
        aliases=("svc",),
    ),
)
