"""What a serving process is configured by: sections of the service's configuration, and the file that a supervisor hands on.

Invariant: a service beyond loopback is refused unless TLS ends here or the configuration says that a proxy ends it.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.study.sections import Section
from workers.serving.trials import FOLDER

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


class ServingSection(Section):
    """`serving:` of the configuration. `threads` are those of torch in each worker. The newest `keep_warm` promoted versions stay on disk
    as files."""

    workers: Annotated[int, Field(ge=1, le=64)] = 2
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 32
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 4.0
    queue: Annotated[int, Field(ge=1, le=100_000)] = 256
    keep_warm: Annotated[int, Field(ge=1, le=1000)] = 3
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Annotated[str, Field(pattern="^(cpu|cuda)$")] = "cpu"


class TlsSection(Section):
    """`listen.tls`: files in PEM."""

    certificate: Path
    key: Path


class ListenSection(Section):
    """`listen:` of the configuration. `hosts` are names that requests may address besides `host` and, on loopback, localhost."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8420
    hosts: tuple[str, ...] = ()
    tls: TlsSection | None = None
    behind_proxy: bool = False

    @property
    def on_loopback(self) -> bool:
        """Whether only processes of this machine reach the port."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def url(self, port: int) -> str:
        """The address of the service at a port of its host."""
        host = self.host.strip("[]")
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def probes_are_open(self) -> bool:
        """Whether health and metrics need no token. Behind a proxy, requests from elsewhere come over loopback as well."""
        return self.on_loopback and not self.behind_proxy

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """What a Host header may name, without its port, in lower case."""
        local = ("localhost", "127.0.0.1", "[::1]") if self.on_loopback else ()
        own = f"[{self.host.strip('[]')}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (own, *local, *self.hosts)) - {"0.0.0.0", "[::]"}

    def check(self) -> None:
        """Raise ConfigError for a port that strangers would reach in the clear, or that no Host header could name."""
        if not self.on_loopback and self.tls is None and not self.behind_proxy:
            raise ConfigError(
                f"listen.host {self.host} is reached from other machines, and tokens would cross the network in the clear: give "
                "listen.tls {certificate, key}, or behind_proxy: true if a proxy before the service ends TLS"
            )
        if not self.allowed_hosts:
            raise ConfigError(
                f"listen.host {self.host} is no name: list in listen.hosts what clients call the service"
            )


class LimitsSection(Section):
    """What one request may be: bytes, seconds, counts. `held_bytes` and `connections` are of all requests of a process together."""

    body_bytes: Count = 32 << 20
    held_bytes: Count = 256 << 20
    picture_bytes: Count = 16 << 20
    picture_pixels: Count = 25_000_000
    pictures: Count = 32
    texts: Count = 64
    labels: Count = 1000
    prompts: Count = 1000
    set_labels: Count = 20_000
    set_prompts: Count = 100_000
    connections: Count = 512
    header_s: Seconds = 10
    body_s: Seconds = 30
    body_bytes_per_s: Count = 64 << 10
    answer_s: Seconds = 30
    stall_s: Seconds = 30


class Setup(Section):
    """All that a serving process needs. `home` holds the configuration and tokenizer of the model, `head` says which weights are
    served (`workers.serving.served.HeadFile`), `state` keeps label sets, tokens and metrics. `out` is the directory of the live service
    whose arrivals and operations are taken as well; without it only questions are answered."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    home: Path
    head: Path
    state: Path
    out: Path | None = None
    serving: ServingSection = ServingSection()
    listen: ListenSection = ListenSection()
    limits: LimitsSection = LimitsSection()

    @property
    def tokens(self) -> Path:
        """The file of token digests."""
        return self.state / "tokens.json"

    @property
    def first_token(self) -> Path:
        """The file of the first operator token."""
        return self.state / "service.token"

    @property
    def ticket_key(self) -> Path:
        """The file of the key that start tickets are signed with."""
        return self.state / "ticket.key"

    @property
    def trials(self) -> Path:
        """The folder of what candidates did on real requests."""
        return self.head.parent / FOLDER

    @property
    def label_sets(self) -> Path:
        """The folder of registered label sets."""
        return self.state / "label_sets"

    @property
    def metrics(self) -> Path:
        """The folder where the processes of one start add up their counters."""
        return self.state / "metrics"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.limits.body_bytes > self.limits.held_bytes:
            raise ValueError(
                "limits.body_bytes is more than limits.held_bytes, so such a body would never be taken"
            )
        if self.limits.picture_bytes > self.limits.body_bytes:
            raise ValueError(
                "limits.picture_bytes is more than limits.body_bytes, so such a picture would never arrive"
            )
        return self
