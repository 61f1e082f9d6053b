"""An S3 server for tests: a real one over HTTP, on this machine, that can be stopped and started."""

from __future__ import annotations

import socket
import uuid

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}


class S3:
    """What it holds outlives a stop, as a real one's does."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )
        self.empty()

    def empty(self) -> None:
        """Another bucket."""
        self.bucket = f"b{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=self.bucket)

    def start(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def uri(self, bucket: str = "") -> str:
        return f"s3://{bucket or self.bucket}/runs?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
