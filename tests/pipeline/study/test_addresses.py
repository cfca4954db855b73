"""Which addresses hold a secret, that no key of a study accepts one, and that no message repeats it."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.study.addresses import redact, refuse_unusable_tracker, secret_in
from pipeline.study.config import study_from
from pipeline.tracking.outbox import FILE, Outbox
from pipeline.tracking.tracker import Tracker
from tests.pipeline.plan_toys import study

SECRET = "hunter2"
WITH_SECRET = (
    "http://ann:{}@host",
    "http://{}@host",
    "https://ann%3A{}@host/x",
    "//ann:{}@host",
    "http://host?token={}",
    "http://host/?api_key={}",
    "http://host/?api-key={}",
    "http://host/?access%5Ftoken={}",
    "http://host/?p%2561ssword={}",
    "http://host/%3Ftoken%3D{}",
    "http://host/#access_token={}",
    "http://host/x;sig={}",
    "postgresql://host/db?user=ann&password={}",
    "postgresql://ann@host/db?sslmode=require&sslpassword={}",
    "postgresql://ann:{}/3@host/db",
    "postgresql://ann:{}#3@host/db",
    "mysql+pymysql://ann:{}@host:3306/db",
    "mssql+pyodbc://?odbc_connect=DRIVER%3D%7BODBC%7D%3BSERVER%3Dhost%3BPWD%3D{}",
    "jdbc:mysql://ann:{}@host/db",
    "s3://bucket/x?X-Amz-Security-Token={}",
)
WITHOUT = (
    "http://127.0.0.1:5000",
    "https://mlflow.example.org/team/",
    "http://[::1]:5000",
    "postgresql://ann@host:5432/db?sslmode=require&sslkey=/keys/a.pem&passfile=/home/ann/.pgpass",
    "postgresql://h1:5432,h2:5432/db",
    "mysql+pymysql://ann@host/db?charset=utf8mb4",
    "sqlite:////data/a@b/mlflow.db?timeout=60",
    "databricks",
    "databricks://profile",
    "databricks://scope:prefix",
    "./mlruns",
)


@pytest.mark.parametrize("address", WITH_SECRET)
def test_address_with_a_secret_is_refused_by_every_key_without_repeating_it(
    address: str, tmp_path: Path
) -> None:
    address = address.format(SECRET)
    tree = study(["zero_shot"], tasks=2).model_dump(mode="json") | {"grid": {"strategies": ["zero_shot"]}}
    sections = [{"tracking": {"uri": address}}]
    sections += [{"storage": {"store": address}}] if "://" in address else []
    for section in sections:
        with pytest.raises(ConfigError, match=r"secret.*environment") as caught:
            study_from(tree | section)
        assert SECRET not in str(caught.value) and next(iter(section)) in str(caught.value)
    with pytest.raises(ConfigError, match="environment") as refused:
        Tracker(tmp_path, Outbox(tmp_path / FILE), uri=address, experiment="x")
    assert SECRET not in str(refused.value)
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("address", WITHOUT)
def test_address_without_a_secret_is_taken(address: str) -> None:
    assert secret_in(address) is None


def test_address_that_is_none_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValueError, match="no address") as caught:
        secret_in("http://[::1")
    assert "::1" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("./mlruns", "is a folder.*leave it out.*sqlite:"),
        ("/shared/mlruns", "is a folder"),
        ("file:///shared/mlruns", "is a folder"),
        ("mlruns:today/x", "'mlruns', for which MLflow has no tracking store"),
        ("htp://host:5000", "'htp', for which MLflow has no tracking store; it has databricks, http"),
        ("s3://bucket/mlruns", "'s3', for which"),
    ],
)
def test_tracker_that_mlflow_cannot_use_is_refused_when_the_study_is_read(address: str, says: str) -> None:
    tree = study(["zero_shot"], tasks=2).model_dump(mode="json") | {"grid": {"strategies": ["zero_shot"]}}
    with pytest.raises(ConfigError, match=f"tracking.*{says}"):
        study_from(tree | {"tracking": {"uri": address}})


@pytest.mark.parametrize("address", [one for one in WITHOUT if one != "./mlruns"])
def test_tracker_that_mlflow_can_use_is_taken(address: str) -> None:
    refuse_unusable_tracker(address)


def test_messages_hold_no_credentials_and_keep_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    assert redact("GET http://u:p@h/x with t0ken failed") == "GET http://***@h/x with *** failed"
    assert (
        redact("http://h/x?page=2&api_key=3 said key='lr'") == "http://h/x?page=2&api_key=*** said key='lr'"
    )


def test_mistake_beside_an_address_does_not_repeat_its_secret() -> None:
    tree = study(["zero_shot"], tasks=2).model_dump(mode="json") | {"grid": {"strategies": ["zero_shot"]}}
    for wrong in (
        f"http://ann:{SECRET}@host",
        {"url": f"http://ann:{SECRET}@host"},
        {"uri": [f"http://{SECRET}@host"]},
    ):
        with pytest.raises(ConfigError, match="tracking") as caught:
            study_from(tree | {"tracking": wrong})
        assert SECRET not in str(caught.value)
