"""Replace one small file only while it is what was read: the pointer that says which manifest of a partition counts.

Local paths: a lock file that one process holds at a time. S3: the store itself compares (`If-Match`, `If-None-Match`),
which Arrow's file system cannot ask for, hence boto3. Other stores have no condition here: whoever writes last wins.
"""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from etl.stage.errors import StageError, kind_of
from etl.stage.local_files import one_at_a_time, replace_text


class Moved(Exception):
    """Somebody else has replaced the file since it was read."""


class Pointer(Protocol):
    """A file as it was read, None where there was none, and how to replace it."""

    text: str | None

    def replace(self, text: str) -> None:
        """Replace the file, whole and to stay. Raises: Moved."""


@contextmanager
def opened(fs: pafs.FileSystem, uri: str, path: str) -> Iterator[Pointer]:
    """Open a pointer to replace it.

    Args:
        uri: the warehouse's address, with its options.
        path: the file's path in `fs`.
    """
    if isinstance(fs, pafs.LocalFileSystem):
        with one_at_a_time(Path(f"{path}.lock")):
            yield _Local(Path(path))
    elif fs.type_name == "s3":
        yield _S3(_client(urllib.parse.urlsplit(uri).query), *path.split("/", 1))
    else:
        yield _Plain(fs, path)


class _Local:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text("utf-8", "replace") if path.exists() else None

    def replace(self, text: str) -> None:
        replace_text(self.path, text, durable=True)


class _S3:
    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self.client, self.where = client, {"Bucket": bucket, "Key": key}
        self.text, self.tag = self._read()

    def replace(self, text: str) -> None:
        condition = {"IfMatch": self.tag} if self.tag else {"IfNoneMatch": "*"}
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.put_object(**self.where, Body=text.encode(), **condition)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise self._failed(error) from error
            # An answer that was lost and asked for again looks the same: then what is there is ours.
            if self._read()[0] != text:
                raise Moved from error
        except BotoCoreError as error:
            raise self._failed(error) from error

    def _read(self) -> tuple[str | None, str]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found = self.client.get_object(**self.where)
        except self.client.exceptions.NoSuchKey:
            return None, ""
        except (BotoCoreError, ClientError) as error:
            raise self._failed(error) from error
        return found["Body"].read().decode("utf-8", "replace"), found["ETag"]

    def _failed(self, error: Exception) -> StageError:
        return kind_of(error)(
            f"s3://{self.where['Bucket']}/{self.where['Key']} cannot be read or replaced: {error}",
            "look at the rights of the AWS_* credentials; the store has to know conditional writes (PutObject with"
            " If-Match)",
        )


class _Plain:
    def __init__(self, fs: pafs.FileSystem, path: str) -> None:
        self.fs, self.path = fs, path
        there = fs.get_file_info(path).type == pafs.FileType.File
        self.text = fs.open_input_stream(path).read().decode("utf-8", "replace") if there else None

    def replace(self, text: str) -> None:
        with self.fs.open_output_stream(self.path) as stream:
            stream.write(text.encode())


@functools.lru_cache(maxsize=8)
def _client(query: str) -> Any:
    """Return a client with the options of a warehouse's URI.

    Credentials are the environment's or the machine's, as Arrow's.
    """
    import boto3
    from botocore.config import Config

    options = dict(urllib.parse.parse_qsl(query))
    endpoint = options.get("endpoint_override")
    # Checksums beyond what a request needs are refused by some servers that are not AWS.
    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if endpoint else {},
    )
    return boto3.client(
        "s3",
        region_name=options.get("region"),
        config=config,
        endpoint_url=f"{options.get('scheme', 'https')}://{endpoint}" if endpoint else None,
    )
