# One image for the code location, the Dagster webserver and the daemon. Build from the repository root.
FROM python:3.11.14-slim-bookworm

ARG XGBOOST=cpu
# For a package index of your own: docker compose build --build-arg PIP_INDEX_URL=…
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
# Dependencies first: they stay cached while only code changes.
COPY pyproject.toml constraints.txt README.md ./
COPY deploy/requirements.py deploy/make_buckets.py deploy/
RUN python deploy/requirements.py --base --extra "$XGBOOST" --extra s3 --extra postgres > requirements.txt \
 && pip install --requirement requirements.txt --constraint constraints.txt

COPY feature_definitions feature_definitions
COPY serving_app serving_app
COPY mlplatform mlplatform
RUN pip install --no-deps .

COPY deploy/dagster.yaml deploy/workspace.yaml /opt/dagster/
RUN useradd --uid 10001 --create-home mlplatform \
 && mkdir -p /var/lib/mlplatform /opt/dagster \
 && chown -R mlplatform /var/lib/mlplatform /opt/dagster
# Not /app: Python would import the copy there instead of the installed package.
WORKDIR /var/lib/mlplatform
USER mlplatform

ARG CODE_VERSION
LABEL org.opencontainers.image.revision=$CODE_VERSION
