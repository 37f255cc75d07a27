"""Addresses hold no secrets: manifests, logs, process lists and web forms show them."""

from __future__ import annotations

import re
import urllib.parse

from etl.errors import StageError

SECRET_PARAMETER = re.compile(r"(^|[_-])(password|passwd|secret|token|sig|signature|key)($|[_-])", re.I)
CONTAINER_AT_ACCOUNT = ("abfs", "abfss")  # `container@account` is how Azure writes a place


def without_secrets(address: str, name: str) -> str:
    """Return a path or URI as it is given.

    Args:
        name: what the address is of, for the message.

    Raises:
        StageError: it is a URI with a user, a password or a key in it. The message does not repeat any of it.
    """
    scheme, mark, rest = address.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return address
    place, _, query = rest.partition("?")
    authority = urllib.parse.unquote(place.split("/")[0])
    user, at, host = authority.rpartition("@")
    # A secret with a slash in it ends the authority early, and what stands before the slash then reads as a host with a port.
    odd_port = re.search(r":(?!\d*$)", re.sub(r"\[[^\]]*\]", "", host))
    container = bool(at) and scheme.lower() in CONTAINER_AT_ACCOUNT and ":" not in user
    if (at and not container) or odd_port or any(SECRET_PARAMETER.search(key) for key, _ in urllib.parse.parse_qsl(query, keep_blank_values=True)):
        raise StageError(f"the address that {name} gives ({scheme}://...) holds a user, a password or a key",
                         "give it without them: credentials belong in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                         "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), in ~/.pgpass, or in the machine's role")
    return address


def below(address: str, folder: str) -> str:
    """Return the address of a folder within a path or URI; a URI's query stays at its end."""
    if "://" not in address:
        return f"{address}/{folder}"
    place, mark, query = address.partition("?")
    return f"{place.rstrip('/')}/{folder}{mark}{query}"
