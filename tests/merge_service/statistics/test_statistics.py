"""Files of statistics and the laws of merges that use them (S1 to S10 of the specification, as far as they concern merging)."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import sha256_of
from merge_service.errors import CorruptCheckpoint, NonFiniteCheckpoint, TechniqueError
from merge_service.merge import advance, fold, merge
from merge_service.merging import Rules
from merge_service.statistics import About, Statistics, pooled, write
from tests.merge_service import measured, toys
from tests.merge_service.statistics import golden

BASE = golden.FOLDER / "toy.base.safetensors"
EXPERTS = [golden.FOLDER / f"toy.expert{number}.safetensors" for number in (1, 2, 3)]
GRAMS = [golden.FOLDER / f"toy.gram{number}.safetensors" for number in (1, 2, 3)]
FISHERS = [golden.FOLDER / f"toy.fisher{number}.safetensors" for number in (1, 2, 3)]
GRADIENTS = [golden.FOLDER / f"toy.gradient{number}.safetensors" for number in (1, 2, 3)]
LOOSE = Rules(any_base=True)
STREAMED = {
    "regmean": ({}, GRAMS),
    "lot": ({}, GRAMS),
    "fisher": ({}, FISHERS),
    "wudi": ({}, [None] * 3),
    "mats": ({"metric": "gram", "iterations": 3}, GRAMS),
    "tatr": ({"quantile": 0.75}, GRADIENTS),
}
FOLDED = ("regmean", "lot", "fisher", "wudi")


def merged(name: str, params: dict, count: int, out: Path, statistics=None) -> bytes:
    given = statistics if statistics is not None else STREAMED[name][1]
    if given[0] is None:
        given = None
    merge(
        name, params, BASE, EXPERTS[:count], out, ids=[f"t{i}" for i in range(count)], rules=LOOSE,
        statistics=given and given[:count],
    )  # fmt: skip
    return out.read_bytes()


@pytest.mark.parametrize("name", STREAMED)
def test_stream_writes_the_bytes_of_the_merge_and_its_state_does_not_grow(name: str, tmp_path: Path) -> None:
    params, statistics = STREAMED[name]
    state, sizes = None, []
    for number, expert in enumerate(EXPERTS):
        after, out = tmp_path / f"state{number}.safetensors", tmp_path / "stream.safetensors"
        advance(
            name, params, BASE, expert, out, expert_id=f"t{number}", state_in=state, state_out=after,
            rules=LOOSE, statistics=statistics[number],
        )  # fmt: skip
        state, sizes = after, [*sizes, after.stat().st_size]
        assert out.read_bytes() == merged(name, params, number + 1, tmp_path / "batch.safetensors")
    assert max(sizes) - min(sizes) < 200  # the names of the experts


@pytest.mark.parametrize("name", FOLDED)
def test_fold_with_weight_one_over_t_is_the_merge(name: str, tmp_path: Path) -> None:
    statistics, running = STREAMED[name][1], EXPERTS[0]
    for number in (2, 3):
        out = tmp_path / f"{number}.safetensors"
        first = statistics[0] if number == 2 else None
        given = [first, statistics[number - 1]] if statistics[0] else None
        fold(
            name,
            {"weight": 1 / number},
            BASE,
            running,
            EXPERTS[number - 1],
            out,
            rules=LOOSE,
            statistics=given,
        )
        running = out
    whole = tmp_path / "whole.safetensors"
    merged(name, {}, 3, whole)
    for key, value in load_file(whole).items():
        np.testing.assert_allclose(load_file(running)[key], value, rtol=1e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", FOLDED)
def test_fold_refuses_a_bare_merged_model(name: str, tmp_path: Path) -> None:
    running, out = tmp_path / "running.safetensors", tmp_path / "out.safetensors"
    merged(name, {}, 2, running)
    with pytest.raises(TechniqueError, match="continues the state of a running model"):
        fold(name, {}, BASE, running, EXPERTS[2], out, rules=LOOSE)
    assert not out.exists()


def test_fold_takes_each_expert_once(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    fold("regmean", {}, BASE, EXPERTS[0], EXPERTS[1], out, rules=LOOSE, statistics=GRAMS[:2])
    with pytest.raises(TechniqueError, match="already in"):
        fold(
            "regmean",
            {},
            BASE,
            out,
            EXPERTS[1],
            tmp_path / "b.safetensors",
            rules=LOOSE,
            statistics=[None, GRAMS[1]],
        )


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    files = [
        measured.save("gram", expert, tmp_path / f"{number}.safetensors", expert_sha256=sha256_of(expert))
        for number, expert in enumerate(EXPERTS)
    ]
    out = tmp_path / "out.safetensors"
    merge("regmean", {}, BASE, EXPERTS, out, rules=LOOSE, statistics=files)
    before = out.read_bytes()
    with pytest.raises(
        TechniqueError, match=r"measured on other weights than .*expert1.*order of the experts"
    ):
        merge("regmean", {}, BASE, EXPERTS, out, rules=LOOSE, statistics=files[::-1])
    assert out.read_bytes() == before


def test_statistics_are_found_beside_the_expert(tmp_path: Path) -> None:
    paths = []
    for expert in EXPERTS:
        paths.append(tmp_path / expert.name)
        paths[-1].write_bytes(expert.read_bytes())
        measured.save("gram", paths[-1])
    out, named = tmp_path / "out.safetensors", tmp_path / "named.safetensors"
    merge("regmean", {}, BASE, paths, out, rules=LOOSE)
    beside = [path.with_name(f"{path.stem}.gram.safetensors") for path in paths]
    merge("regmean", {}, BASE, paths, named, rules=LOOSE, statistics=beside)
    assert out.read_bytes() == named.read_bytes()
    beside[1].unlink()
    with pytest.raises(
        TechniqueError, match=r"needs statistics of kind gram.*expert2.*temporal-merge measure gram"
    ):
        merge("regmean", {}, BASE, paths, out, rules=LOOSE)


@pytest.mark.parametrize(
    ("name", "params", "statistics", "words"),
    [
        ("regmean", {}, FISHERS, "kind fisher, and gram is needed"),
        ("wudi", {}, GRAMS, "needs no statistics"),
        ("mats", {"metric": "identity"}, GRAMS, "needs no statistics"),
        ("regmean", {}, GRAMS[:2], "2 files of statistics for 3 experts"),
        ("regmean", {}, EXPERTS, "holds no statistics of this version"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(name, params, statistics, words, tmp_path: Path) -> None:
    with pytest.raises((TechniqueError, CorruptCheckpoint), match=words):
        merge(name, params, BASE, EXPERTS, tmp_path / "out.safetensors", rules=LOOSE, statistics=statistics)


def test_kfac_has_no_stream(tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match="no stream form"):
        advance(
            "mats", {"metric": "kfac"}, BASE, EXPERTS[0], None, expert_id="a", state_in=None,
            state_out=tmp_path / "s.safetensors",
        )  # fmt: skip


def changed(source: Path, out: Path, change) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, out, {"statistics": Statistics(source).kind})
    return out


KEY = "visual.transformer.resblocks.0.mlp.c_fc.weight"


def test_numbers_that_are_not_finite_are_refused_with_expert_and_key(tmp_path: Path) -> None:
    bad = changed(GRAMS[1], tmp_path / "bad.gram.safetensors", lambda t: t[KEY].fill(np.nan))
    with pytest.raises(NonFiniteCheckpoint, match=f"bad.gram.safetensors.*{KEY}"):
        merge(
            "regmean",
            {},
            BASE,
            EXPERTS,
            tmp_path / "o.safetensors",
            rules=LOOSE,
            statistics=[GRAMS[0], bad, GRAMS[2]],
        )


def test_tensor_without_statistics_is_the_mean_and_is_reported(tmp_path: Path) -> None:
    less = changed(GRAMS[1], tmp_path / "less.safetensors", lambda t: t.pop(KEY))
    out = tmp_path / "out.safetensors"
    report = merge("regmean", {}, BASE, EXPERTS, out, rules=LOOSE, statistics=[GRAMS[0], less, GRAMS[2]])
    assert any("1 tensors are averaged" in note and KEY in note for note in report.notes)
    mean = np.mean([load_file(expert)[KEY] for expert in EXPERTS], axis=0)
    np.testing.assert_allclose(load_file(out)[KEY], mean, rtol=1e-6)


def test_gram_of_another_width_is_refused(tmp_path: Path) -> None:
    bad = changed(
        GRAMS[0], tmp_path / "b.safetensors", lambda t: t.update({KEY: np.eye(3, dtype=np.float32)})
    )
    with pytest.raises(TechniqueError, match=f"{KEY}.*3, 3.*measure again"):
        merge(
            "regmean",
            {},
            BASE,
            EXPERTS,
            tmp_path / "o.safetensors",
            rules=LOOSE,
            statistics=[bad, *GRAMS[1:]],
        )


def of(kind: str) -> list[Path]:
    return [golden.FOLDER / f"toy.{kind}{number}.safetensors" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "params", "kind", "change", "words"),
    [
        ("regmean", {}, "gram", lambda t: t.update({KEY: -t[KEY]}), f"{KEY} has numbers below zero"),
        ("mats", {}, "gram", lambda t: t.update({KEY: np.tril(t[KEY])}), f"{KEY} has two different halves"),
        ("lot", {}, "gram", lambda t: t.update({KEY: t[KEY][:-1]}), f"{KEY} has shape .* is square"),
        ("mats", {"metric": "kfac"}, "kfac", lambda t: t.update({KEY + ":out": -t[KEY + ":out"]}), f"{KEY}:out has numb"),
        ("fisher", {}, "fisher", lambda t: t.update({KEY: -t[KEY]}), f"{KEY} holds numbers below zero"),
        ("mats", {"metric": "fisher"}, "fisher", lambda t: t.update({KEY: -t[KEY]}), f"{KEY} holds numbers below"),
        ("fisher", {}, "fisher", lambda t: t.update({KEY: t[KEY][:-1]}), f"{KEY} has shape .* elements; measure again"),
        ("tatr", {}, "gradient", lambda t: t.update({KEY: t[KEY][:-1]}), f"{KEY} has shape .* elements; measure again"),
        ("regmean", {}, "gram", lambda t: [t.update({"model." + key: t.pop(key)}) for key in list(t)],
         "holds nothing of any tensor of .*expert2.*: its names are model"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_measured_of_the_expert_are_refused_and_nothing_is_written(
    name, params, kind, change, words, tmp_path: Path
) -> None:
    one, _, three = of(kind)
    bad = changed(of(kind)[1], tmp_path / "bad.safetensors", change)
    with pytest.raises(TechniqueError, match=words):
        merge(
            name, params, BASE, EXPERTS, tmp_path / "o.safetensors", rules=LOOSE, statistics=[one, bad, three]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_half_of_kfac_is_reported_as_none(tmp_path: Path) -> None:
    one, two, three = of("kfac")
    less = changed(two, tmp_path / "less.safetensors", lambda t: t.pop(KEY + ":out"))
    report = merge(
        "mats",
        {"metric": "kfac"},
        BASE,
        EXPERTS,
        tmp_path / "o.safetensors",
        rules=LOOSE,
        statistics=[one, less, three],
    )
    assert any("1 tensors are averaged" in note and KEY in note for note in report.notes)


def test_singular_grams_are_finite_and_keep_the_anchor_outside_their_span(tmp_path: Path) -> None:
    """S10: only input 0 was ever seen."""

    def one_input(tensors: dict) -> None:
        for name, value in tensors.items():
            if value.ndim == 2:
                tensors[name] = np.zeros_like(value)
                tensors[name][0, 0] = 1

    files = [changed(gram, tmp_path / gram.name, one_input) for gram in GRAMS]
    out = tmp_path / "out.safetensors"
    merge("regmean", {"off_diagonal": 1.0}, BASE, EXPERTS, out, rules=LOOSE, statistics=files)
    mean = np.mean([load_file(expert)[KEY] for expert in EXPERTS], axis=0)
    assert np.isfinite(load_file(out)[KEY]).all()
    np.testing.assert_allclose(load_file(out)[KEY], mean, atol=1e-6)
    merge(
        "regmean", {"off_diagonal": 1.0, "anchor": "base"}, BASE, EXPERTS, out, rules=LOOSE, statistics=files
    )
    np.testing.assert_allclose(load_file(out)[KEY][:, 1:], load_file(BASE)[KEY][:, 1:], atol=1e-6)


def test_regmean_needs_no_base(tmp_path: Path) -> None:
    out, based = tmp_path / "out.safetensors", tmp_path / "based.safetensors"
    merge("regmean", {}, None, EXPERTS, out, rules=LOOSE, statistics=GRAMS)
    merge("regmean", {}, BASE, EXPERTS, based, rules=LOOSE, statistics=GRAMS)
    for key, value in load_file(based).items():
        np.testing.assert_allclose(load_file(out)[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_parts_of_the_data_are_pooled_by_rows(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(5, 3)), np.random.default_rng(1).normal(size=(11, 3))
    for name, rows in (("x", x), ("y", y), ("both", np.concatenate([x, y]))):
        write(
            tmp_path / name,
            {"w": rows.T @ rows / len(rows)},
            About("gram", {"w": len(rows)}, len(rows), "a" * 64),
        )
    about = pooled([tmp_path / "x", tmp_path / "y"], tmp_path / "pooled")
    with Statistics(tmp_path / "pooled") as found, Statistics(tmp_path / "both") as both:
        assert found.about == about == both.about
        np.testing.assert_allclose(found.get("w"), both.get("w"), rtol=1e-6)
    write(tmp_path / "other", {"w": np.eye(3)}, About("gram", {"w": 1}, 1, "b" * 64))
    with pytest.raises(TechniqueError, match="not parts of one measurement"):
        pooled([tmp_path / "x", tmp_path / "other"], tmp_path / "no")


def tied_model(seed: int) -> dict[str, np.ndarray]:
    """A model whose output layer is its embedding, and one more matrix."""
    rng = np.random.default_rng(seed)
    table, inner = rng.standard_normal((6, 4)), rng.standard_normal((4, 4))
    named = {"embed.weight": table, "blocks.0.inner.weight": inner, "lm_head.weight": table}
    return {name: one.astype(np.float32) for name, one in named.items()}


@pytest.mark.parametrize("kept", [["embed.weight"], ["lm_head.weight"], ["embed.weight", "lm_head.weight"]])
def test_tied_tensor_has_the_statistic_of_any_of_its_names_once(kept: list[str], tmp_path: Path) -> None:
    models = [tied_model(seed) for seed in range(3)]
    fishers = [{name: one**2 + 0.1 for name, one in tied_model(seed + 9).items()} for seed in (1, 2)]
    files = [tmp_path / f"m{number}.safetensors" for number in range(3)]
    for file, model in zip(files, models):
        save_file(model, file)
    given = [tmp_path / "f1", tmp_path / "f2"]
    for file, fisher in zip(given, fishers):
        save_file(
            {name: fisher[name] for name in ["blocks.0.inner.weight", *kept]}, file, {"statistics": "fisher"}
        )
    out = tmp_path / "out.safetensors"
    report = merge("fisher", {}, files[0], files[1:], out, rules=LOOSE, statistics=given)
    assert not any("without statistics" in note for note in report.notes)
    merged, own = load_file(out), ["embed.weight", "blocks.0.inner.weight"]
    norms = [np.sqrt(sum((fisher[name].astype(float) ** 2).sum() for name in own)) for fisher in fishers]
    for name in merged:
        shares = [fisher[name].astype(float) / norm for fisher, norm in zip(fishers, norms)]
        right = sum(share * model[name] for share, model in zip(shares, models[1:])) / sum(shares)
        np.testing.assert_allclose(merged[name], right, rtol=1e-5, atol=1e-6)


def test_tied_tensor_with_two_statistics_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / f"m{number}.safetensors" for number in range(2)]
    for seed, file in enumerate(files):
        save_file(tied_model(seed), file)
    fisher = {name: one**2 for name, one in tied_model(5).items()}
    fisher["lm_head.weight"] = fisher["lm_head.weight"] * 2
    save_file(fisher, tmp_path / "f", {"statistics": "fisher"})
    with pytest.raises(TechniqueError, match=r"two fisher of one tensor.*embed.weight and lm_head.weight"):
        merge(
            "fisher",
            {},
            files[0],
            files[1:],
            tmp_path / "out.safetensors",
            rules=LOOSE,
            statistics=[tmp_path / "f"],
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_trust_region_streams_to_the_bit_where_its_quantile_is_searched_in_passes(tmp_path: Path) -> None:
    """90,000 elements are more than are drawn whole: the search reads the held sums and the new expert."""
    rng, shape = np.random.default_rng(5), (300, 300)
    base = rng.normal(size=shape).astype(np.float32)
    taus = [(rng.normal(size=shape) * 0.01).astype(np.float32) for _ in range(3)]
    slopes = [rng.exponential(size=shape) for _ in range(3)]
    start, state = toys.save(tmp_path / "base.safetensors", {"w": base}), None
    experts = [toys.save(tmp_path / f"e{i}.safetensors", {"w": base + tau}) for i, tau in enumerate(taus)]
    files = [tmp_path / f"g{i}.safetensors" for i in range(3)]
    for file, one in zip(files, slopes):
        write(file, {"w": one}, About("gradient", {"w": 8}, 8))
    out, after = tmp_path / "stream.safetensors", tmp_path / "merge.safetensors"
    for number, expert in enumerate(experts):
        state_out = tmp_path / f"s{number}.safetensors"
        advance("tatr", {}, start, expert, out, expert_id=f"t{number}", state_in=state, state_out=state_out,
                statistics=files[number])  # fmt: skip
        state = state_out
    merge("tatr", {}, start, experts, after, ids=["t0", "t1", "t2"], statistics=files)
    assert out.read_bytes() == after.read_bytes()
    moved = [np.abs(load_file(path)["w"] - base).astype(np.float64) for path in experts]
    harm = sum(moved) * sum(slopes) - sum(g * tau for g, tau in zip(slopes, moved))
    kept = harm >= np.sort(harm, axis=None)[int(harm.size * 0.99)]
    np.testing.assert_array_equal(load_file(out)["w"][kept], base[kept])
    assert (load_file(out)["w"] != base)[~kept].all()
