"""Packed matrices in one tensor are merged one by one, or the report says that they were not."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.anatomy.packed import Packing
from merge_service.merge import advance, fold, merge
from tests.merge_service import toys

D, HEAD, HEADS = 8, 4, 2
RNG = np.random.default_rng(0)


def parts(*rows: int) -> list[np.ndarray]:
    return [RNG.standard_normal((n, D)).astype(np.float32) for n in rows]


def stacked(matrices: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(matrices)


def columns(matrices: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([m.T for m in matrices], axis=1)


def per_head(matrices: list[np.ndarray], groups: int = HEADS) -> np.ndarray:
    cut = [m.reshape(groups, -1, HEAD, D) for m in matrices]
    return np.concatenate(cut, axis=1).reshape(-1, D)


def in_experts(matrices: list[np.ndarray], alternate: bool = False) -> np.ndarray:
    """Gates and ups of two experts, [in, out]."""
    pairs = [(matrices[0].T, matrices[1].T), (matrices[2].T, matrices[3].T)]
    return np.stack([np.stack(p, 2).reshape(D, -1) if alternate else np.concatenate(p, 1) for p in pairs])


Q = "model.layers.0.self_attn"
CASES = {
    "open_clip": ("t.resblocks.0.attn.in_proj_weight", stacked, (D, D, D), {}, {}),
    "SigLIP head": ("vision_model.head.attention.in_proj_weight", stacked, (D, D, D), {}, {}),
    "timm": ("visual.trunk.blocks.0.attn.qkv.weight", stacked, (D, D, D), {}, {}),
    "Phi-3": (f"{Q}.qkv_proj.weight", stacked, (D, 4, 4), {f"{Q}.o_proj.weight": (D, D)}, {}),
    "Phi-3 wide heads": (f"{Q}.qkv_proj.weight", stacked, (16, 8, 8), {f"{Q}.o_proj.weight": (D, 16)}, {}),
    "ModernBERT": ("layers.0.attn.Wqkv.weight", stacked, (D, D, D), {"layers.0.attn.Wo.weight": (D, D)}, {}),
    "gate and up": ("l.0.mlp.gate_up_proj.weight", stacked, (12, 12), {"l.0.mlp.down_proj.weight": (D, 12)}, {}),
    "ModernBERT MLP": ("l.0.mlp.Wi.weight", stacked, (12, 12), {"l.0.mlp.Wo.weight": (D, 12)}, {}),
    "GPT-2": ("h.0.attn.c_attn.weight", columns, (D, D, D), {"h.0.attn.c_proj.weight": (D, D)}, {}),
    "GPT-2 cross": ("h.0.crossattention.c_attn.weight", columns, (D, D), {}, {}),
    "GPT-BigCode": ("h.0.attn.c_attn.weight", stacked, (D, 4, 4), {"h.0.attn.c_proj.weight": (D, D)}, {}),
    "GPT-NeoX": ("l.0.attention.query_key_value.weight", per_head, (D, D, D), {}, {"model_type": "gpt_neox", "num_attention_heads": HEADS}),
    "BLOOM": ("h.0.self_attention.query_key_value.weight", per_head, (D, D, D), {}, {"model_type": "bloom", "n_head": HEADS}),
    "Falcon": ("h.0.self_attention.query_key_value.weight", stacked, (D, HEAD, HEAD), {}, {"model_type": "falcon", "num_attention_heads": HEADS, "multi_query": True}),
    "Falcon, groups": ("h.0.self_attention.query_key_value.weight", per_head, (16, D, D), {}, {"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "experts": ("l.0.mlp.experts.down_proj", lambda m: np.stack(m), (5, 5), {}, {}),
    "experts, rows": ("l.0.mlp.experts.gate_up_proj", lambda m: np.stack(m).reshape(2, 12, D), (6, 6, 6, 6), {"l.0.mlp.experts.down_proj": (2, D, 6)}, {}),
    "Granite": ("l.0.block_sparse_moe.input_linear.weight", lambda m: np.stack(m).reshape(2, 12, D), (6, 6, 6, 6), {"l.0.block_sparse_moe.output_linear.weight": (2, D, 6)}, {}),
    "Granite, shared": ("l.0.shared_mlp.input_linear.weight", stacked, (12, 12), {"l.0.shared_mlp.output_linear.weight": (D, 12)}, {}),
    "experts, columns": ("l.0.mlp.experts.gate_up_proj", in_experts, (6, 6, 6, 6), {"l.0.mlp.experts.down_proj": (2, 6, D)}, {}),
    "GPT-OSS": ("l.0.mlp.experts.gate_up_proj", lambda m: in_experts(m, True), (6, 6, 6, 6), {"l.0.mlp.experts.down_proj": (2, 6, D), "l.0.mlp.experts.gate_up_proj_bias": (2, 12)}, {}),
}  # fmt: skip
"""Name, how its matrices are packed, their rows, what lies beside it, and the configuration."""


class World:
    """Three models with a packed tensor, and the same models with separate matrices."""

    def __init__(self, room: Path, case: str) -> None:
        self.name, self.pack, rows, beside, config = CASES[case]
        self.count, self.room = len(rows), room
        if config:
            (room / "config.json").write_text(json.dumps(config))
        first, *models = (dict(enumerate(parts(*rows))) for _ in range(3))
        models = [list(toys.kin(first, model).values()) for model in (first, *models)]
        others = [{n: RNG.standard_normal(s).astype(np.float32) for n, s in beside.items()} for _ in range(3)]
        others = [toys.kin(others[0], other) for other in others]
        self.packed = [
            toys.save(room / f"p{i}.safetensors", {self.name: self.pack(m), **o})
            for i, (m, o) in enumerate(zip(models, others))
        ]
        self.apart = [
            toys.save(room / f"a{i}.safetensors", {f"part{k}": self.shaped(p) for k, p in enumerate(m)})
            for i, m in enumerate(models)
        ]

    def shaped(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix in the form of the packed tensor: [in, out] if it is packed so."""
        transposed = self.pack is columns or (
            self.pack not in (stacked, per_head) and "_proj" in self.name and self.in_columns
        )
        return np.ascontiguousarray(matrix.T if transposed else matrix)

    @property
    def in_columns(self) -> bool:
        return CASES["experts, columns"][1] is self.pack or CASES["GPT-OSS"][1] is self.pack

    def both(self, work) -> tuple[np.ndarray, np.ndarray]:
        """The merged packed tensor, and the merged separate matrices, packed."""
        report = work(self.packed, self.room / "p.safetensors")
        work(self.apart, self.room / "a.safetensors")
        apart = toys.load(self.room / "a.safetensors")
        matrices = [apart[f"part{k}"] for k in range(self.count)]
        transposed = self.pack is columns or self.in_columns
        assert not any("merged as one matrix" in note for note in report.notes)
        return toys.load(self.room / "p.safetensors")[self.name], self.pack(
            [m.T if transposed else m for m in matrices]
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("technique", ["iso_c", "iso_cts", "opcm"])
def test_packed_matrices_merge_as_they_do_apart(tmp_path: Path, case: str, technique: str) -> None:
    world = World(tmp_path, case)
    found, expected = world.both(lambda files, out: merge(technique, {}, files[0], files[1:], out))
    if technique == "opcm":  # its length is that of the whole model
        found, expected = (
            x - world_base for x, world_base in ((found, base(world)), (expected, base(world)))
        )
        found, expected = found / np.linalg.norm(found), expected / np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def base(world: World) -> np.ndarray:
    return toys.load(world.packed[0])[world.name]


@pytest.mark.parametrize("case", CASES)
def test_packed_matrices_fold_as_they_do_apart(tmp_path: Path, case: str) -> None:
    world = World(tmp_path, case)
    found, expected = world.both(lambda files, out: fold("rapf", {}, files[0], files[1], files[2], out))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("case", ["GPT-2", "GPT-NeoX"])
def test_stream_of_packed_matrices_is_the_merge_of_them(tmp_path: Path, case: str) -> None:
    world, out, state = World(tmp_path, case), tmp_path / "o.safetensors", None
    merge("iso_c", {}, world.packed[0], world.packed[1:], out, ids=["1", "2"])
    whole = out.read_bytes()
    for i in (1, 2):
        after = tmp_path / f"s{i}.safetensors"
        advance("iso_c", {}, world.packed[0], world.packed[i], out, expert_id=str(i), state_in=state, state_out=after)  # fmt: skip
        state = after
    assert out.read_bytes() == whole


@pytest.mark.parametrize("case", CASES)
def test_matrices_of_a_tensor_hold_each_element_once(case: str) -> None:
    name, pack, rows, beside, config = CASES[case]
    shape = pack(parts(*rows)).shape
    known = {"heads": config.get("num_attention_heads", config.get("n_head", 0)), "groups": config.get("num_kv_heads", 0), "grouped": "num_kv_heads" in config, "model_type": config.get("model_type", "")}  # fmt: skip
    seen = np.zeros(int(np.prod(shape)), int)
    found = Packing({name: shape, **beside}, known, True).matrices(name)
    for piece in found:
        part = seen[piece.start : piece.stop]
        piece.put(part, piece.of(part) + 1)
    assert len(found) == len(rows) and (seen == 1).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt_neox.layers.0.attention.query_key_value.weight", (24, 8)),
        ("transformer.h.0.attn.qkv_proj.weight", (24, 8)),  # CodeGen's order is another one
        ("model.layers.0.attention.wqkv.weight", (16, 8)),
        ("transformer.h.0.attn.c_attn.weight", (24, 8)),
        ("model.layers.0.self_attn.qkv_proj.weight", (16, 8)),  # no output projection to say how wide q is
    ],
)
def test_report_names_packed_matrices_that_were_merged_whole(tmp_path: Path, name: str, shape) -> None:
    tensors = {name: np.ones(shape, np.float32), name.replace(".0.", ".1."): np.ones(shape, np.float32)}
    files = [
        toys.save(tmp_path / f"{i}.safetensors", {n: v * i for n, v in tensors.items()}) for i in range(3)
    ]
    report = merge("iso_c", {}, files[0], files[1:], tmp_path / "o.safetensors")
    assert [note for note in report.notes if note.startswith(f"{name} and 1 more: merged as one matrix")]
    for technique, params in (("iso_c", {"attention": "whole"}), ("ties", {})):
        report = merge(technique, params, files[0], files[1:], tmp_path / "o.safetensors")
        assert not any("one matrix" in note for note in report.notes)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"model_type": 3, "num_attention_heads": "many"}', '{"text_config": 1}']
)
def test_configuration_that_says_nothing_leaves_matrices_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    name = "l.0.attention.query_key_value.weight"
    packing = Packing.of({name: (24, 8)}, tmp_path / "m.safetensors", split=True)
    assert len(packing.matrices(name)) == 1 and len(packing.remarks) == 1
