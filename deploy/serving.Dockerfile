# The prediction service: its own extra and the native model runtime, no Dagster, no MLflow client. Build from the repository root.
FROM python:3.11.14-slim-bookworm

ARG XGBOOST=cpu
# `torch` where networks are served too; empty: trees alone, and a smaller image.
ARG TORCH=
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY deploy/requirements.py deploy/
# polars: the modules of request-time functions import mlplatform.specs, which names its types.
RUN python deploy/requirements.py --extra serving --extra otel --extra "$XGBOOST" ${TORCH:+--extra "$TORCH"} --package polars > requirements.txt \
 && pip install --requirement requirements.txt --constraint constraints.txt

COPY feature_definitions feature_definitions
COPY mlplatform mlplatform
COPY serving_app serving_app
RUN pip install --no-deps .

RUN useradd --uid 10001 --create-home mlplatform \
 && mkdir -p /var/lib/mlplatform \
 && chown mlplatform /var/lib/mlplatform
WORKDIR /var/lib/mlplatform
USER mlplatform

EXPOSE 8000
# Listens on 127.0.0.1 until MLPLATFORM_SERVING_HOST and MLPLATFORM_SERVING_AUTH say otherwise.
CMD ["python", "-m", "serving_app"]
