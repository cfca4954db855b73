"""A local S3-compatible server for tests, in a separate process so that child processes of tests reach it, too."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROGRAM = """
import logging, sys, time
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
with open(sys.argv[1] + ".part", "w") as stream:
    stream.write("http://%s:%d" % server.get_host_and_port())
import os
os.replace(sys.argv[1] + ".part", sys.argv[1])
time.sleep(3600)
"""
SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(room: Path) -> Iterator[str]:
    """The address of the server. The bucket `bucket` exists, and the environment points to the server until the end of
    the block.
    """
    said, before = room / "address", dict(os.environ)
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(said)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not said.exists():
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.02)
        os.environ |= SECRETS | {"AWS_ENDPOINT_URL": said.read_text()}
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield said.read_text()
    finally:
        process.kill()
        process.wait(20)
        for name in (*SECRETS, "AWS_ENDPOINT_URL"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
