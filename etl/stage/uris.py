"""Addresses hold no secrets: manifests, logs, process lists and web forms show them."""

from __future__ import annotations

import re
import urllib.parse

from etl.stage.errors import StageError

SECRET_PARAMETER = re.compile(r"(^|[_-])(password|passwd|secret|token|sig|signature|key)($|[_-])", re.I)
CONTAINER_AT_ACCOUNT = ("abfs", "abfss")  # `container@account` is how Azure writes a place
# An absolute path or a URI, without control characters and without anything that a shell would read as its own. Only a
# URI has a query, and none has user info (a container of Azure is none). The last lookahead is for Python, whose `$`
# also matches before a final newline.
_PLAIN = r"""[^\x00-\x1f\x7f;&|<>$`"'\\(){}\[\]*?!#]"""
_HOST = r"[A-Za-z0-9._~-]*(:[0-9]+)?"
FOLDER_PATTERN = (
    rf"^(/{_PLAIN}*|(abfss?://[a-z0-9-]+@|[a-z][a-z0-9+.-]*://){_HOST}(/{_PLAIN}*)?(\?[A-Za-z0-9._~%:/=&+,-]*)?)$(?!\n)"
)


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
    # A secret with a slash in it ends the authority early, and what stands before the slash then reads as a host with a
    # port.
    odd_port = re.search(r":(?!\d*$)", re.sub(r"\[[^\]]*\]", "", host))
    container = bool(at) and scheme.lower() in CONTAINER_AT_ACCOUNT and ":" not in user
    if (
        (at and not container)
        or odd_port
        or any(SECRET_PARAMETER.search(key) for key, _ in urllib.parse.parse_qsl(query, keep_blank_values=True))
    ):
        raise StageError(
            f"the address that {name} gives ({scheme}://...) holds a user, a password or a key",
            "give it without them: credentials belong in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), in ~/.pgpass, or in the machine's role",
        )
    return address


def folder_problem(address: str) -> str | None:
    """Return why an address cannot be that of a folder of raw logs, without any secret in it; None where it can."""
    try:
        without_secrets(address, "it")
    except StageError as error:
        return f"{error.what}: {error.remedy}"
    if re.match(FOLDER_PATTERN, address):
        return None
    if "://" not in address and not address.startswith("/"):
        return (
            f"{address!r} is relative, and every process would look for it in its own working folder; give an absolute"
            " path or a URI"
        )
    return (
        f"{address!r} holds a character that a shell reads as its own, or is no address; give a plain absolute path or"
        " a URI such as s3://bucket/folder"
    )


def below(address: str, folder: str) -> str:
    """Return the address of a folder within a path or URI; a URI's query stays at its end."""
    if "://" not in address:
        return f"{address}/{folder}"
    place, mark, query = address.partition("?")
    return f"{place.rstrip('/')}/{folder}{mark}{query}"
