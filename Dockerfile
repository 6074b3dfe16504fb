# The daemon alone: no torch, no vLLM. `docker build -t loracache .`; deploy/compose.yaml runs it beside an engine.
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY requirements/dev.lock requirements/
COPY loracache loracache
COPY connectors connectors
COPY kernels kernels
COPY storage_backends storage_backends
RUN python -m venv /opt/loracache \
    && /opt/loracache/bin/pip install --no-cache-dir --constraint requirements/dev.lock .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/loracache /opt/loracache
COPY deploy/loracache.yaml /etc/loracache/loracache.yaml
# A named volume takes over what the image has at its place, the owner too.
RUN groupadd --gid 10001 loracache \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin loracache \
    && install --directory --owner=loracache --group=loracache --mode=0700 /run/loracache /var/cache/loracache
ENV PATH=/opt/loracache/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LORACACHE_SOCKET=/run/loracache/loracache.sock
USER 10001:10001
VOLUME ["/run/loracache", "/var/cache/loracache"]
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s CMD ["loracache", "status"]
# As process 1 the daemon gets the signal itself, and writes what is queued before it ends: give `docker stop` the time.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/loracache/bin/loracache", "serve"]
CMD ["--config", "/etc/loracache/loracache.yaml"]
