# The MLflow server with the drivers of its two stores. Build from the repository root.
FROM python:3.11.14-slim-bookworm

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
COPY pyproject.toml constraints.txt ./
COPY deploy/requirements.py deploy/
RUN python deploy/requirements.py --package mlflow --package boto3 --package psycopg2-binary > requirements.txt \
 && pip install --requirement requirements.txt --constraint constraints.txt

RUN useradd --uid 10001 --create-home mlflow
WORKDIR /home/mlflow
USER mlflow

EXPOSE 5000
