"""The storage section: what it accepts, and that it affects no result."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.store.local import Store
from pipeline.store.open import store_at
from pipeline.study.config import study_from
from pipeline.study.sections import StorageSection
from pipeline.workspace.opening import store_of
from tests.pipeline.plan_toys import facts, make_plan, study


@pytest.mark.parametrize(
    "where", ["s3://key:secret@bucket/x", "s3://key@bucket/x", "s3://bucket/x?token=1", "https://u:p@host/x"]
)
def test_url_that_holds_a_secret_is_refused_without_repeating_it(where: str) -> None:
    one = study(["zero_shot"], tasks=2)
    tree = one.model_dump(mode="json") | {"storage": {"store": where}, "grid": {"strategies": ["zero_shot"]}}
    with pytest.raises(ConfigError, match=r"storage.*environment") as caught:
        study_from(tree)
    assert "secret" not in str(caught.value).replace("holds a secret", "")


def test_place_of_the_store_does_not_bear_on_any_fingerprint() -> None:
    one = study(["best_in_time"], tasks=2)
    other = one.model_copy(update={"storage": StorageSection(store="s3://bucket/x")})
    assert make_plan(one, facts(2)).steps.keys() == make_plan(other, facts(2)).steps.keys()


def test_relative_directory_is_made_absolute_for_those_who_read_it_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = study(["zero_shot"], tasks=2)
    relative = one.model_copy(update={"storage": StorageSection(store="shared")})
    assert relative.settled().storage.store == str(tmp_path / "shared")
    assert one.settled() is one


def test_null_path_and_file_url_are_directories(tmp_path: Path) -> None:
    assert store_at(None, tmp_path) == Store(tmp_path / "store")
    assert (
        store_at(str(tmp_path / "s"), Path())
        == Store(tmp_path / "s")
        == store_at((tmp_path / "s").as_uri(), Path())
    )
    assert store_of(tmp_path) == Store(tmp_path / "store")
    (tmp_path / "study.yaml").write_text(f"storage: {{store: {tmp_path / 's'}}}\n")
    assert store_of(tmp_path) == Store(tmp_path / "s")
    (tmp_path / "study.yaml").write_text("storage: [")
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        store_of(tmp_path)
