"""An S3 server on loopback, for tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

BUCKET = "lake"
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run one with a bucket, its credentials in the environment; yield what follows `s3://bucket/folder` in a URI."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    before = {name: os.environ.get(name) for name in AWS}
    os.environ.update(AWS)
    try:
        endpoint = f"127.0.0.1:{server.get_host_and_port()[1]}"
        query = f"?scheme=http&endpoint_override={endpoint}&region=us-east-1&allow_delayed_open=true"
        pafs.FileSystem.from_uri(f"s3://{BUCKET}{query}&allow_bucket_creation=true")[0].create_dir(BUCKET)
        yield query
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
