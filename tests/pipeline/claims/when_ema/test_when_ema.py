"""The study is judged by its written rule: on invented replicates with a known truth, and on kept numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from merge_service.errors import UserError
from pipeline.claims.judge import EQUIVALENT, HOLDS, REFUTED, UNDECIDED
from pipeline.claims.when_ema import __main__ as command
from pipeline.claims.when_ema import advising, measures
from pipeline.claims.when_ema.design import Design, read_design
from pipeline.claims.when_ema.hypotheses import Judgement, judge_all
from pipeline.claims.when_ema.measures import EE, EL, FT, LE
from pipeline.claims.when_ema.numbers import Numbers, base_of, has, read_numbers, write
from pipeline.claims.when_ema.page import paragraph
from pipeline.claims.when_ema.page import write as write_page
from pipeline.study.config import load_study
from tests.pipeline.claims.when_ema.toys import NAMES, RATES, SHARES, World, numbers
from tests.world import ROOT

ALL = ("H1", "H2", "H3", "H4")
SEEDS = pytest.mark.parametrize("seed", range(3))


@pytest.fixture(scope="module")
def design() -> Design:
    return read_design(ROOT / "configs" / "studies" / "when_ema" / "pieces.yaml")


def judgement(world: World) -> Judgement:
    return judge_all(measures.core(numbers(world), NAMES))


def verdicts(world: World) -> dict[str, str]:
    return {one.name: one.verdict for one in judgement(world).hypotheses}


@SEEDS
def test_hypotheses_that_are_true_hold(seed: int) -> None:
    found = judgement(World(seed=seed))
    assert {one.name: one.verdict for one in found.hypotheses} == dict.fromkeys(ALL, HOLDS)
    assert found.gains[0].verdict == HOLDS and found.gains[-1].verdict == REFUTED
    assert found.replicates == tuple(range(8)) and found.shares == SHARES


@SEEDS
def test_no_effect_is_equivalent_and_says_nothing_of_the_weights(seed: int) -> None:
    found = judgement(World(sign=0, seed=seed))
    assert {answer.verdict for answer in found.gains} == {EQUIVALENT}
    by_name = {one.name: one.verdict for one in found.hypotheses}
    assert by_name["H1"] == by_name["H2"] == EQUIVALENT and by_name["H3"] == HOLDS
    assert by_name["H4"] in (UNDECIDED, EQUIVALENT)


@SEEDS
def test_reversed_truth_is_refuted(seed: int) -> None:
    assert verdicts(World(sign=-1, apart=0.02, seed=seed)) == dict.fromkeys(ALL, REFUTED)


def test_noise_beyond_the_effect_is_undecided_and_one_replicate_decides_nothing() -> None:
    assert set(verdicts(World(noise=0.08)).values()) == {UNDECIDED}
    assert set(verdicts(World(replicates=1)).values()) == {UNDECIDED}


def test_a_gain_that_falls_without_changing_sign_is_not_enough_for_h1() -> None:
    """The last of H1's parts fails: if every weight but 1 loses, nothing is lost with the weight nearest to 1 left out."""
    truth = numbers()
    lifted = (
        truth.points["share"].eq(0.66) & truth.points["init"].eq("ema") & truth.points["deploy"].eq("ema")
    )
    points = truth.points.copy()
    for name in ("gm_val", "gm_test"):
        points.loc[lifted, name] += 0.04
    (first, *_) = judge_all(Numbers(points, truth.experts, truth.made)).hypotheses
    assert [answer.verdict for answer in first.deciding] == [
        HOLDS,
        HOLDS,
        REFUTED,
    ] and first.verdict == REFUTED


def test_departure_of_one_share_refutes_h3_and_a_departure_within_the_margin_does_not() -> None:
    truth = numbers()
    for more, verdict in ((0.02, REFUTED), (0.002, HOLDS)):
        points = truth.points.copy()
        moved = points["share"].eq(0.2) & points["init"].eq("latest") & points["deploy"].eq("ema")
        points.loc[moved, "gm_test"] += more
        assert judge_all(Numbers(points, truth.experts, truth.made)).hypotheses[2].verdict == verdict


def test_choice_sees_val_alone_and_takes_the_lower_rate_and_larger_weight_of_equals() -> None:
    truth = numbers(World(replicates=2))
    ends = measures.endpoints(truth)
    picks = measures.chosen(ends)
    shuffled = ends.assign(gm=np.random.default_rng(1).permutation(ends["gm"]))
    assert measures.chosen(shuffled)["weight"].equals(picks["weight"])
    flat = measures.chosen(ends.assign(val=0.5))
    best = flat[flat["arm"].isin([LE, EL, EE])]
    assert set(best["lr"]) == {RATES[0]} and set(best["weight"]) == {0.95}
    per_rate = measures.chosen(ends, ["lr"])
    assert per_rate.groupby(["share", "replicate", "arm"]).size().loc[:, :, EE].eq(3).all()
    assert (measures.best_weights(ends.assign(val=0.5))["best"] == 1).all()


def test_endpoints_are_means_over_the_stream_without_the_base_and_the_last_score() -> None:
    truth = numbers(World(replicates=1), names=("share_20",))
    ends = measures.endpoints(truth)
    row = ends[(ends["arm"] == EE) & (ends["weight"] == 0.5) & (ends["lr"] == 3e-4)].iloc[0]
    rows = truth.points[(truth.points["init"] == "ema") & (truth.points["deploy"] == "ema")]
    rows = rows[(rows["weight"] == 0.5) & (rows["lr"] == 3e-4)].set_index("t")
    assert row["gm"] == pytest.approx((rows.loc[1, "gm_test"] + rows.loc[2, "gm_test"]) / 2)
    assert row["gm_end"] == rows.loc[2, "gm_test"]
    assert row["val"] == pytest.approx((rows.loc[1, "gm_val"] + rows.loc[2, "gm_val"]) / 2)
    assert (ends[ends["arm"] == FT]["weight"] == 1).all()


def test_slopes_are_those_of_lines_by_hand() -> None:
    rows = pd.DataFrame(
        [
            {"replicate": k, "share": share, "lr": lr, "drift": 10.0**power, "gain": k + 2 * power * (1 + share) - 3 * share}
            for k in (0, 1) for share in (0.0, 0.5) for power, lr in ((-2, 1e-4), (-1, 1e-3))
        ]
    )  # fmt: skip
    assert measures.by_drift(rows, "gain").tolist() == pytest.approx([2.5, 2.5])
    at_one = rows[rows["lr"] == 1e-3]
    assert measures.by_share(at_one, "gain").tolist() == pytest.approx([-2.5, -2.5])
    assert measures.by_share(rows, "gain", "lr").tolist() == pytest.approx([-3, -3])


def test_bend_is_the_score_of_an_average_above_the_average_of_scores() -> None:
    truth = numbers(World(replicates=1), names=("share_20",))
    bends = measures.bends(truth)
    points = truth.points.set_index(["init", "deploy", "weight", "lr", "t"])["gm_test"]
    for arm, init, new in ((LE, "latest", ("latest", "latest", np.nan)), (EE, "ema", ("ema", "latest", 0.8))):
        found = bends[
            (bends["arm"] == arm) & (bends["weight"] == 0.8) & (bends["lr"] == 1e-3) & (bends["t"] == 2)
        ]
        expert = truth.points[
            (truth.points["init"] == new[0])
            & (truth.points["deploy"] == new[1])
            & (truth.points["lr"] == 1e-3)
            & (truth.points["t"] == 2)
        ]
        expert = expert[expert["weight"].isna() if arm == LE else expert["weight"] == 0.8]["gm_test"].item()
        now, before = (points[(init, "ema", 0.8, 1e-3, t)] for t in (2, 1))
        assert found["bend"].item() == pytest.approx(now - 0.8 * expert - 0.2 * before)


def test_only_whole_replicates_are_judged() -> None:
    truth = numbers(World(replicates=3))
    gone = (truth.made["replicate"] == 1) & (truth.made["piece"] == "share_40")
    short = Numbers(truth.points, truth.experts, truth.made[~gone])
    assert set(measures.core(short, NAMES).points["replicate"]) == {0, 2}
    with pytest.raises(UserError, match="no replicate has all of"):
        measures.core(numbers(World(replicates=1), names=NAMES[:2]), NAMES)


def test_advised_weight_is_tested_where_it_had_no_say() -> None:
    truth = numbers(World(replicates=4))
    found = advising.tested(truth).set_index("replicate")
    assert (found["advised"] > found["fine-tuning"]).all() and (found["advised"] > found["constant"]).all()
    points = truth.points.copy()
    mine = points["replicate"] == 2
    points.loc[mine, "gm_val"] = np.random.default_rng(3).permutation(points.loc[mine, "gm_val"])
    again = advising.tested(Numbers(points, truth.experts, truth.made)).set_index("replicate")
    told = ["advised", "constant", "constant_weight"]
    assert again.loc[2, told].tolist() == pytest.approx(found.loc[2, told].tolist(), abs=1e-12)
    assert again.loc[2, "own"] != found.loc[2, "own"]
    assert advising.tested(numbers(World(replicates=1))).empty


def test_design_has_five_shares_eight_replicates_and_seeds_of_their_own(design: Design) -> None:
    assert design.replicates == tuple(range(8))
    core = design.chosen(None, None)
    assert len(core) == 40 and {piece.name for piece in core} == set(NAMES)
    assert [piece.replicate for piece in core[:6]] == [0, 0, 0, 0, 0, 1]
    shares = {}
    for piece in design.chosen([3], [piece.name for piece in design.pieces if piece.core]):
        settings = design.overrides(piece, Path("b"))
        study = load_study(design.study, settings)
        mixture = study.cells[-1].recipe.mixture
        shares[piece.name] = mixture.pretraining + mixture.buffer
        assert mixture.pretraining == mixture.buffer and study.streams[0].seed == 3
        assert {cell.seed for cell in study.cells} == {3} and len(study.cells) == 2 * (1 + 3 * 13)
    assert list(shares.values()) == pytest.approx(list(SHARES))


def test_every_fringe_piece_is_a_valid_study_that_differs_in_one_thing(design: Design) -> None:
    for name in {piece.name for piece in design.pieces if not piece.core}:
        (piece,) = design.chosen([0], [name])
        settings = design.overrides(piece, Path("b"))
        study = load_study(design.study, settings)
        assert len(study.cells) in (2 * 40, 2 * 3 * 7)
    with pytest.raises(UserError, match="no piece 'steps_30'; did you mean steps_300"):
        design.chosen(None, ["steps_30"])
    with pytest.raises(UserError, match="no replicate 9"):
        design.chosen([0, 9], None)


def test_numbers_come_back_as_they_were_kept_and_two_bases_of_a_replicate_are_refused(
    tmp_path: Path, design: Design
) -> None:
    truth = numbers(World(replicates=1), names=("share_00", "share_10"))
    pieces = design.chosen([0], ["share_00", "share_10"])
    for piece in pieces:
        assert not has(tmp_path, piece)
        keep(tmp_path, truth, piece)
        assert has(tmp_path, piece) and base_of(tmp_path, piece) is None
    back = read_numbers(tmp_path)
    pd.testing.assert_frame_equal(
        back.points[truth.points.columns], truth.points, atol=1e-6, check_dtype=False
    )
    other = truth.made.assign(base_sha256="another")
    keep(
        tmp_path, Numbers(truth.points, truth.experts, other), replace(pieces[0], name="share_20"), "share_00"
    )
    with pytest.raises(UserError, match="replicate 0 began at different bases of s"):
        read_numbers(tmp_path)
    with pytest.raises(UserError, match="no finished piece"):
        read_numbers(tmp_path / "nothing")


def keep(folder: Path, truth: Numbers, piece: object, of: str | None = None) -> None:
    mine = truth.of(of or piece.name)  # type: ignore[attr-defined]
    said = [name for name in measures.UNIT if name in mine.points]
    frames = {
        "points": mine.points.drop(columns=said),
        "experts": mine.experts.drop(columns=said),
        "made": mine.made,
    }
    write(folder, piece, frames)  # type: ignore[arg-type]


def test_page_says_on_how_many_replicates_it_rests_and_what_is_undecided(
    tmp_path: Path, design: Design
) -> None:
    core = numbers(World(replicates=3))
    lines = write_page(tmp_path / "when_ema.md", core, design)
    text = (tmp_path / "when_ema.md").read_text()
    best = measures.best_weights(measures.endpoints(core))
    at = best[(best["share"] == 0.66) & (best["lr"] == 1e-4)]["best"].mean()
    assert f"\n| 0.66 | {at:.2f}".replace(" 0.", " .", 1).replace("| .66", "| 0.66") in text
    assert "rest on 3 of 8 replicates**; they are provisional" in text
    assert [line.split()[0] for line in lines] == list(ALL)
    for name in ("map", "shares", "weights", "why"):
        assert (
            f"(when_ema/{name}.svg)" in text
            and "<path" in (tmp_path / "when_ema" / f"{name}.svg").read_text()
        )
    assert (tmp_path / "when_ema" / "verdicts.json").is_file() and (
        tmp_path / "when_ema" / "advice.json"
    ).is_file()


def test_page_names_the_settings_that_were_not_run_and_shows_those_that_were(
    tmp_path: Path, design: Design
) -> None:
    core = numbers(World(replicates=2))
    write_page(tmp_path / "when_ema.md", core, design)
    text = (tmp_path / "when_ema.md").read_text()
    assert "Not run yet: `steps_300`, `tasks_20`, " in text and "One axis at a time" not in text
    longer = {"piece": "steps_300", "steps_per_task": 300}
    both = [
        pd.concat([frame, frame[frame["piece"] == "share_20"].assign(**longer)], ignore_index=True)
        for frame in (core.points, core.experts, core.made)
    ]
    write_page(tmp_path / "when_ema.md", Numbers(*both), design)
    text = (tmp_path / "when_ema.md").read_text()
    assert "Not run yet: `tasks_20`, " in text and "| steps_300 | 2 | s | 2 | 300 | 0.1 / 0.1 | " in text


def test_paragraph_of_advice_follows_from_the_verdicts() -> None:
    true, nothing = paragraph(judgement(World())), paragraph(judgement(World(sign=0)))
    assert "Against the base itself (zero-shot): it gains at shares of 0, 0.1, 0.2, 0.4 and 0.66." in true
    assert "it gains at shares of 0, 0.1 and 0.2" in true and "it loses at a share of 0.66" in true
    assert "less weight the further tasks drift" in true and "without training anything" in true
    assert (
        "it ties (within .005) at shares of 0, 0.1, 0.2, 0.4 and 0.66" in nothing and "further" not in nothing
    )


def test_paragraph_of_advice_says_what_holds_of_a_hypothesis_that_is_undecided() -> None:
    judged = judgement(World())
    (*others, h4) = judged.hypotheses
    by_drift, by_share = h4.deciding
    half = replace(h4, deciding=(replace(by_drift, verdict=UNDECIDED), by_share), verdict=UNDECIDED)
    text = paragraph(replace(judged, hypotheses=(*others, half)))
    assert text.endswith("Give the new expert less weight the less is replayed.")


def test_command_goes_on_where_it_stopped_and_begins_nothing_that_would_not_end_in_time(
    tmp_path: Path, design: Design, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    clock = [0.0]

    def carry(piece: object, *_: object) -> None:
        ran.append(piece.key)  # type: ignore[attr-defined]
        clock[0] += 600
        (tmp_path / piece.key).mkdir(parents=True)  # type: ignore[attr-defined]

    monkeypatch.setattr(command, "carry_out", carry)
    monkeypatch.setattr(command, "make_bases", lambda *_: None)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    places = command.Places(tmp_path, tmp_path)
    pieces = design.chosen([0, 1], None)
    left = command.run(pieces, design, places, minutes=25)
    assert ran == ["0-share_00", "0-share_10"] and left == [
        "8 pieces are left; give the same command again to go on"
    ]
    assert command.run(pieces, design, places, minutes=1000) == [] and len(ran) == 10


def test_settings_of_ones_own_need_numbers_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert command.main(["--set", "stream.chunks=2"]) == 2
    assert "give --numbers" in capsys.readouterr().err
    assert command.numbered("0,2-4") == [0, 2, 3, 4]
