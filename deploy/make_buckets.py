"""Makes the named S3 buckets; one that is there already is left as it is.

Belongs here: the production profile's one-off preparation of its S3 server. Does not belong here: anything the platform does later.
"""

import os
import sys

import boto3
from botocore.exceptions import ClientError

THERE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make_buckets(endpoint_url: str, names: list[str]) -> None:
    """Credentials and region come from the environment, as boto3 reads them."""
    s3 = boto3.client("s3", endpoint_url=endpoint_url)
    for name in names:
        try:
            s3.create_bucket(Bucket=name)
        except ClientError as refused:
            if refused.response["Error"]["Code"] not in THERE:
                raise


if __name__ == "__main__":
    make_buckets(os.environ["S3_ENDPOINT_URL"], sys.argv[1:])
