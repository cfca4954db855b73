"""A candidate answers real requests beside what is served: who answers, what is counted, and that its failures reach nobody."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_service.live import Observed
from tests.serving_toys import LABELS, Zoo, picture
from tests.workers.serving.test_serving import Fixed, seen, serving
from workers.serving.labels import LabelSet
from workers.serving.served import HeadFile, Trial
from workers.serving.serving import Serving
from workers.serving.snapshot import Answer, Work

LABEL_SET = LabelSet(LABELS, ("a {c} thing",))


class Broken:
    """A snapshot whose every answer is not finite."""

    def knows(self, labels: LabelSet) -> bool:
        return True

    def answer(self, works: Sequence[Work]) -> list[Answer | Exception]:
        return [FloatingPointError("not finite")] * len(works)


async def compared(one: Serving) -> Observed:
    await asyncio.gather(*one._trying._comparing)
    return one._trying.observed


def test_canary_returns_the_candidates_answer_and_a_shadow_does_not(zoo: Zoo, tmp_path: Path) -> None:
    images = seen(zoo.home, picture(), picture(1))
    told: dict[str, Observed] = {}

    async def test(one: Serving) -> None:
        await one.start(Fixed(zoo.served(0)))
        work = Work(images=images, labels=LABEL_SET)
        alone = await one.answer(work, "ann")
        for at, shadow in enumerate((False, True)):
            trial = Trial(zoo.served(1), 1.0, shadow, f"trial-{shadow}")
            await one._trying.follow(trial, told.__setitem__)
            answer = await one.answer(work, "ann")
            assert answer.served.t == (0 if shadow else 1)
            observed = await compared(one)
            same = answer.values.argmax(axis=1) == alone.values.argmax(axis=1)
            assert (observed.requests, observed.failed, observed.pictures) == (1, 0, 2)
            assert observed.agreed == (told["trial-False"].agreed if at else same.sum())
            assert observed.seconds > 0 < observed.usual
            await one._trying.follow(trial, told.__setitem__)
            assert told[trial.key] == observed
        await one._trying.follow(None, told.__setitem__)
        assert (await one.answer(work, "ann")).served.t == 0

    serving(zoo.home, tmp_path, test)


def test_candidate_that_fails_is_counted_and_its_clients_have_the_usual_answer(
    zoo: Zoo, tmp_path: Path
) -> None:
    work, told = Work(images=seen(zoo.home, picture())), dict[str, Observed]()

    async def test(one: Serving) -> None:
        await one.start(Fixed(zoo.served(0)))
        broken: Any = Broken()
        await one._trying.follow(Trial(zoo.served(1), 1.0, False, "a"), told.__setitem__)
        one._trying._snapshot = broken
        assert (await one.answer(work, "ann")).served.t == 0
        assert await compared(one) == Observed(requests=1, failed=1)
        await one._trying.follow(Trial(zoo.damaged("nan")[0], 1.0, False, "b"), told.__setitem__)
        assert told["b"] == Observed(requests=1, failed=1)
        assert (await one.answer(work, "ann")).served.t == 0

    serving(zoo.home, tmp_path, test)


def test_session_is_always_answered_by_the_same_model_and_the_head_keeps_the_trial(
    zoo: Zoo, tmp_path: Path
) -> None:
    trial = Trial(zoo.served(1), 0.25, False, "a-000003-9")
    taken = [trial.takes(f"session {number}") for number in range(2000)]
    assert taken == [trial.takes(f"session {number}") for number in range(2000)]
    assert 400 < sum(taken) < 600  # by digests, so always the same number
    head = HeadFile(tmp_path / "head.json")
    head.write(zoo.served(0), (), trial)
    assert head.trial() == trial and head.current() == zoo.served(0)
    head.write(zoo.served(0))
    assert head.trial() is None
