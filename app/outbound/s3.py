"""Objects in S3, by s3fs in the event loop of event_loop.py. Credentials, region and endpoint come from the AWS_*
variables and files that all programs for S3 read."""
import asyncio
import contextlib
import functools
import io
import logging

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from app.outbound.event_loop import close_with, loop
from app.outbound.http import RequestFailed, too_large

CONNECT_WITHIN_S = 3
READ_WITHIN_S = 10    # for the next piece
WITHIN_S = 120        # for a whole call
TRIES = 2
PIECE = 2**18
MOST_DELETED = 1000   # objects in one call

log = logging.getLogger(__name__)
for library in ("botocore", "aiobotocore", "s3fs"):  # they say much of every request
    logging.getLogger(library).setLevel(logging.WARNING)


class NoCredentials(OSError, RequestFailed):
    """The service was given no credentials, or only a part of them."""


class S3:
    """All functions are coroutines and raise OSError (FileNotFoundError, PermissionError, TimeoutError, …)."""

    def __init__(self, is_traced=False):
        self.system, self.loop, self.is_traced = None, None, is_traced

    async def get(self, bucket, key, most_bytes, taken=lambda size: None):
        """An object's bytes. taken: as of http.Client.fetch. Raises http.TooLarge too."""
        async with asyncio.timeout(WITHIN_S):
            found = await self.call("get_object", Bucket=bucket, Key=key)
            content, body = io.BytesIO(), found["Body"]
            try:
                while content.tell() <= most_bytes >= found["ContentLength"]:
                    piece = await body.read(PIECE)
                    if not piece:
                        break
                    content.write(piece)
                    taken(len(piece))
            except (BotoCoreError, aiohttp.ClientError) as e:
                raise OSError(f"{type(e).__name__}: {e}") from e
            finally:
                body.close()
            if max(content.tell(), found["ContentLength"]) > most_bytes:
                raise too_large(most_bytes)
            return content.getvalue()

    async def put(self, bucket, key, data):
        async with asyncio.timeout(WITHIN_S):
            await self.call("put_object", Bucket=bucket, Key=key, Body=data)

    async def listed(self, bucket, prefix):
        """[(key, time of its last change in Unix seconds)] of all objects whose keys begin with prefix."""
        objects, more = [], {}
        async with asyncio.timeout(WITHIN_S):
            while True:
                page = await self.call("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
                objects += [(one["Key"], one["LastModified"].timestamp()) for one in page.get("Contents", [])]
                if not page.get("IsTruncated"):
                    return objects
                more = {"ContinuationToken": page["NextContinuationToken"]}

    async def delete(self, bucket, keys):
        async with asyncio.timeout(WITHIN_S):
            for start in range(0, len(keys), MOST_DELETED):
                some = [{"Key": key} for key in keys[start:start + MOST_DELETED]]
                answer = await self.call("delete_objects", Bucket=bucket, Delete={"Objects": some, "Quiet": True})
                for error in answer.get("Errors", []):
                    raise OSError(f"{error.get('Code')}: {error.get('Key')} cannot be deleted")

    async def call(self, method, **arguments):
        if self.loop is not loop():  # the first time, and in a process that was forked
            self.loop = loop()
            self.system = s3fs.S3FileSystem(
                asynchronous=True, loop=self.loop, skip_instance_cache=True,
                config_kwargs={"connect_timeout": CONNECT_WITHIN_S, "read_timeout": READ_WITHIN_S,
                               "retries": {"total_max_attempts": 1}})
            self.system.retries = TRIES
            close_with(self, functools.partial(close, self.system))
        try:
            with self.span(method, arguments):
                return await self.system._call_s3(method, **arguments)
        except (NoCredentialsError, PartialCredentialsError) as e:
            log.error("no credentials for S3, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: %s", e)
            raise NoCredentials("the service has no credentials for S3") from e
        except (BotoCoreError, ClientError, aiohttp.ClientError) as e:  # s3fs makes an OSError of most others
            raise OSError(f"{type(e).__name__}: {e}") from e

    def span(self, method, arguments):
        if not self.is_traced:
            return contextlib.nullcontext()
        from app.tracing import spans
        return spans.s3(method.title().replace("_", ""), arguments["Bucket"], arguments.get("Key"))


async def close(system):
    if system._s3 is not None:
        await system._s3.close()
