# The service with its dependencies, and nothing else; `docker compose up` runs it beside a database.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml setup.cfg README.rst LICENSE ./
COPY microbatch microbatch
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir ".[service]" gunicorn

FROM python:3.13-slim
COPY --from=build /venv /venv
RUN useradd --system --no-create-home microbatch
USER microbatch
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 MICROBATCH_HOST=0.0.0.0 MICROBATCH_PORT=3000
EXPOSE 3000
# A drain takes up to MICROBATCH_DELIVERY_TIMEOUT: give it that much, with `docker stop --time 30`.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:3000/healthz', timeout=4)"]
CMD ["microbatch", "serve"]
