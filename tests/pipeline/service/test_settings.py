"""Where a service may listen, and under which names it may be addressed."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.service.settings import LimitsSection, ListenSection, Setup

TLS = {"certificate": "cert.pem", "key": "key.pem"}


@pytest.mark.parametrize(
    "listen",
    [{}, {"host": "localhost"}, {"host": "::1"}, {"host": "127.8.9.1"}, {"host": "0.0.0.0", "tls": TLS, "hosts": ["a"]},
     {"host": "10.1.2.3", "behind_proxy": True}, {"host": "merge.example", "tls": TLS}],
)  # fmt: skip
def test_loopback_tls_and_a_proxy_are_taken(listen: dict[str, Any]) -> None:
    ListenSection.model_validate(listen).check()


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.1.2.3", "merge.example", "localhost.example", "2130706433"]
)
def test_port_that_strangers_reach_in_the_clear_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="in the clear"):
        ListenSection(host=host).check()


def test_service_on_all_addresses_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"listen\.hosts"):
        ListenSection.model_validate({"host": "0.0.0.0", "tls": TLS}).check()


def test_allowed_hosts_are_the_configured_ones_and_local_ones_on_loopback_only() -> None:
    assert ListenSection().allowed_hosts == {"127.0.0.1", "localhost", "[::1]"}
    public = ListenSection.model_validate({"host": "10.1.2.3", "tls": TLS, "hosts": ["Merge.example"]})
    assert public.allowed_hosts == {"10.1.2.3", "merge.example"}
    assert not public.probes_are_open and ListenSection().probes_are_open
    assert not ListenSection(behind_proxy=True).probes_are_open


@pytest.mark.parametrize("changes", [{"listen": {"porrt": 1}}, {"limits": {"answer_s": 0}}, {"name": "../x"}, {"limits": {"picture_bytes": 1 << 30}}, {"serving": {"device": "tpu"}}])  # fmt: skip
def test_setup_with_a_mistake_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Setup.model_validate(
            {"name": "zoo", "home": tmp_path, "head": tmp_path, "state": tmp_path, **changes}
        )


def test_limits_are_what_the_documentation_states() -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    for name, value in LimitsSection().model_dump().items():
        assert f"| `{name}` | {value:,}" in page, name
