#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the image, start it, and stop it: it has to become healthy as a user who is not root, and to end on SIGTERM with 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

docker build --tag loracache .
container=$(docker run --detach --read-only --tmpfs /tmp --cap-drop ALL --memory 1g --env LORACACHE_MEMORY=512MiB loracache)
trap 'docker rm --force --volumes "$container" >/dev/null' EXIT
die() {
    docker logs "$container"
    echo "make image: $*" >&2
    exit 1
}

for _ in {1..60}; do
    health=$(docker inspect --format '{{.State.Health.Status}}' "$container")
    [[ $health == starting ]] || break
    sleep 1
done
[[ $health == healthy ]] || die "is $health"
[[ $(docker exec "$container" id --user) != 0 ]] || die "runs as root"
docker stop --timeout 30 "$container" >/dev/null
code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || die "ended with $code"
echo "Ready: image loracache"
