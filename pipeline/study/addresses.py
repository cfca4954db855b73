"""The rules for addresses of trackers and stores: what one may contain, and what may be shown of it.

An address is written into files (the resolved study, the outbox, MLflow's parameters), so it must hold no secret.
Invariant: one rule for all addresses, applied after percent-decoding; no message repeats an address that breaks it.
"""

import os
import re
from importlib.metadata import entry_points
from urllib.parse import unquote, unquote_plus, urlsplit

from merge_service.errors import UserError

_HOLDS = ("password", "passwd", "passphrase", "secret", "token", "apikey", "accesskey", "accountkey", "sharedkey", "privatekey",
          "credential", "signature")  # fmt: skip
"""A parameter is a secret if its name contains one of these, whatever else it contains (`sslpassword`,
`X-Amz-Security-Token`).
"""
_IS = frozenset(
    {
        "pass",
        "pw",
        "pwd",
        "psw",
        "key",
        "auth",
        "authorization",
        "bearer",
        "jwt",
        "sas",
        "sig",
        "keypassphrase",
    }
)
_PARAMETER = re.compile(r"([^?&;#,{}()\s=/]+)\s*=\s*([^&;#,}\s]+)")
_QUERY = re.compile(r"(?<=[?&;])([^?&;#=\s]+)=([^&;#\s]*)")
_USERINFO = re.compile(r"//([^/?#\s@]*(?:@[^/?#\s@]*)*)@")
_DATABASES = frozenset(
    {"postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "cockroachdb", "sqlite"}
)
"""Their addresses name a user, which is not a secret; for other schemes, the part before an @ is often a token."""
_TRACKERS = frozenset({"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"})
_NAMED_KEYS = frozenset({"databricks"})
"""Schemes in which `name:name` stands for two names, and neither is a port."""
CREDENTIALS = (
    "give it in the environment instead: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN "
    "(PGPASSWORD for PostgreSQL), and the plain address here"
)
"""Advice on where to put the secrets of a tracker."""
_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def secret_in(address: str) -> str | None:
    """A description of the part of an address that is or may be a secret, without repeating it; None if there is none.

    Raises ValueError, without the address, if it cannot be parsed.
    """
    text = _decoded(address)
    scheme = address.partition("://")[0].strip().lower()
    for named in _USERINFO.findall(text):
        if ":" in named:
            return "a password"
        if scheme.partition("+")[0] not in _DATABASES:
            return "a user name or token before the @"
    for key, _ in _PARAMETER.findall(text):
        if _is_secret(key):
            return f"the parameter {key[:40]!r}"
    if "://" in address and _has_odd_port(address, scheme):
        return "a port that is not a number (a password with / or # looks like one)"
    return None


def refuse_secret(key: str, address: str, instead: str, *, queries: bool = True) -> None:
    """Raise ValueError if the address under a key may hold a secret, or a query unless `queries`; `instead` is the advice."""
    try:
        found = secret_in(address) or ("a query" if not queries and urlsplit(address).query else None)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if found:
        raise ValueError(f"{key} holds a secret ({found}), which would end up in files; {instead}")


def server_at(address: str, instead: str) -> str:
    """The address of a server that requests go to, without / at its end; `instead` says where a secret belongs.

    Raises UserError for another scheme than http and https, and, without the address, for one that may hold a secret.
    """
    try:
        found = secret_in(address)
    except ValueError as error:
        raise UserError(f"the address of the server: {error}") from None
    if found:
        raise UserError(
            f"the address of the server holds a secret ({found}), which messages would show; {instead}"
        )
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{address} is no address of a server: give http://HOST:PORT or https://HOST:PORT")
    return address.rstrip("/")


def refuse_unusable_tracker(address: str) -> None:
    """Raise ValueError if MLflow has no tracking store for an address.

    MLflow no longer records runs in folders (`./mlruns`). A scheme that neither MLflow nor an installed plugin supports
    is a typing error.
    """
    scheme, colon, _ = address.partition(":")
    scheme = scheme.strip().lower().partition("+")[0]
    if not colon or scheme == "file" or "/" in scheme:
        if address.strip().lower() == "databricks":
            return
        raise ValueError(
            "uri is a folder, and MLflow records nothing in folders any more; leave it out (MLflow's database is in OUT then), or "
            "name a database (sqlite:////shared/mlflow.db) or a server (http://host:5000)"
        )
    if scheme in _TRACKERS:
        return
    known = _TRACKERS | {point.name for point in entry_points(group="mlflow.tracking_store")}
    if scheme not in known:
        raise ValueError(
            f"uri begins with {scheme[:20]!r}, for which MLflow has no tracking store; it has {', '.join(sorted(known))}"
        )


def redact(text: str) -> str:
    """`text` without anything that may be secret in its addresses, and without the values of MLflow's credential variables."""
    for variable in _SECRET_VARIABLES:
        secret = os.environ.get(variable)
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)
    return _QUERY.sub(lambda found: f"{found[1]}=***" if _is_secret(unquote(found[1])) else found[0], text)


def _is_secret(key: str) -> bool:
    plain = re.sub(r"[^a-z0-9]", "", key.lower())
    return plain in _IS or any(word in plain for word in _HOLDS)


def _decoded(address: str) -> str:
    """The address percent-decoded repeatedly, so that a secret that is encoded twice is found, too."""
    for _ in range(4):
        plain = unquote_plus(address)
        if plain == address:
            break
        address = plain
    return address


def _has_odd_port(address: str, scheme: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        raise ValueError(
            "it is no address (a bracket is not closed, or a character is not allowed)"
        ) from None
    host = parts.netloc.rpartition("]")[2]
    return scheme not in _NAMED_KEYS and any(
        ":" in one and not one.rpartition(":")[2].isdigit() and not one.endswith(":")
        for one in host.split(",")
    )
